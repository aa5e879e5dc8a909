"""How predictions fade with distance: recall of a decode step's experts, so many layers ahead (Shen et al., figure of 3.1).

    python -m eval.prediction_decay eval/traces/*-1.npz --predictors last_step,pregate,TRAINED.json --output decay.png

As many experts are predicted as were used. A JSON file with the figures is written beside the plot.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from eval.replay_predictors import Material, predictors_by
from eval.servers import describe_run
from sglmoe.demo_model import DEMO_MODEL
from sglmoe.prediction.predictor import ModelParts, Predictor
from sglmoe.prediction.trace import load_trace
from sglmoe.prediction.training_data import TracePart
from sglmoe.prediction.training_report import measure

Curves = Mapping[str, Mapping[str, Sequence[float | None]]]  # by trace and predictor


def curves_of(path: Path, names: Sequence[str], model_path: Path) -> dict[str, list[float | None]]:
    """By predictor: recall 1, 2, ... layers ahead; None where it predicts nothing."""
    trace = load_trace(path)
    material = Material(trace, model_path)
    everyone = np.ones(int(trace.owners.max()) + 1, np.bool_)
    part = TracePart(path.stem, trace, everyone, material.gate_inputs)
    found = {}
    for name in tqdm(names, desc=path.stem, unit="predictor"):
        label = Path(name).stem
        measured = measure(label, partial(new_predictor, name, material), part)
        (decode,) = (its for its in measured if its.kind == "decode")
        found[label] = [its.accuracy or None for its in decode.by_distance]
    return found


def new_predictor(name: str, material: Material, parts: ModelParts) -> Predictor:
    (predictor,) = predictors_by(name, material).values()
    return predictor


def plot(curves: Curves, path: Path) -> None:
    """One panel a trace, one line a predictor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1,
        len(curves),
        figsize=(3 * len(curves), 3),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (trace, lines) in zip(axes[0], curves.items(), strict=True):
        for name, recalls in lines.items():
            axis.plot(range(1, len(recalls) + 1), recalls, marker=".", label=name)
        axis.set(title=trace, xlabel="layers ahead", ylim=(0, 1))
    axes[0][0].set_ylabel("recall of experts")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncol=6)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--predictors", default="last_step,frequency,previous_layer,pregate")
    parser.add_argument("--model-path", type=Path, default=DEMO_MODEL)
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    options = parser.parse_args()
    names = options.predictors.split(",")
    curves = {its.stem: curves_of(its, names, options.model_path) for its in options.traces}
    figures: dict[str, Any] = {
        trace: {name: [its and round(its, 3) for its in recalls] for name, recalls in lines.items()}
        for trace, lines in curves.items()
    }
    text = json.dumps(describe_run() | {"recall": figures}, indent=1)
    options.output.with_suffix(".json").write_text(text + "\n")
    plot(curves, options.output)


if __name__ == "__main__":
    main()
