"""How well can it be known before a step how many experts its layers will use?

    python -m eval.expert_demand eval/traces/*.npz

ExpertFlow (Shen et al., 2.2) holds that the summed squared distance of a batch's token embeddings
tells it better than the number of tokens. Each signal here is fitted to the steps so far (least squares,
recent ones weighing more) and then asked about the next; the mean error is in experts a layer. Beside them
what a predictor expects, by the sum of its probabilities and by the paper's covering count.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.replay_predictors import Material, forecast_by
from sglmoe.demo_model import DEMO_MODEL
from sglmoe.prediction.horizon import covering_experts, token_distance
from sglmoe.prediction.predictor import LayerRouting, StepTokens
from sglmoe.prediction.trace import Trace, load_trace

HALF_LIFE_STEPS = 64  # Arbitrary
COVERAGE = 0.9  # Arbitrary: the paper does not say
FIRST_STEPS = 8  # Arbitrary: not counted, as nothing is known yet

Floats = npt.NDArray[np.float64]
Signals = Callable[[StepTokens, Floats], list[float]]  # tokens, their embeddings


def log_tokens(tokens: StepTokens, _: Floats) -> list[float]:
    return [float(np.log(tokens.num_tokens))]


def log_distinct(tokens: StepTokens, _: Floats) -> list[float]:
    return [float(np.log(len(np.unique(tokens.token_ids))))]


def log_distance(_: StepTokens, embeddings: Floats) -> list[float]:
    return [float(np.log1p(token_distance(embeddings)))]


SIGNALS: dict[str, Signals] = {
    "nothing": lambda tokens, _: [],
    "tokens": lambda tokens, _: [tokens.num_tokens],
    "distance": lambda _, embeddings: [token_distance(embeddings)],
    "log tokens": log_tokens,
    "log distance": log_distance,
    "log distinct tokens": log_distinct,
    "log tokens, log distance": lambda *of: log_tokens(*of) + log_distance(*of),
    "log tokens, log distinct tokens": lambda *of: log_tokens(*of) + log_distinct(*of),
}


class Fit:
    """Weighted linear least squares with a constant."""

    def __init__(self, num_signals: int):
        size = num_signals + 1
        self._squares: Floats = 1e-6 * np.eye(size)  # that much regularized
        self._products: Floats = np.zeros(size)
        self._decay = 0.5 ** (1 / HALF_LIFE_STEPS)

    def note(self, signals: list[float], amount: float) -> None:
        row = np.array([1.0, *signals])
        self._squares = self._decay * self._squares + np.outer(row, row)
        self._products = self._decay * self._products + amount * row

    def at(self, signals: list[float]) -> float:
        weights = np.linalg.lstsq(self._squares, self._products)[0]
        return float(weights @ np.array([1.0, *signals]))


def steps(trace: Trace) -> Iterator[tuple[StepTokens, slice]]:
    for start, stop in zip(trace.step_bounds[:-1], trace.step_bounds[1:], strict=True):
        at = slice(int(start), int(stop))
        yield StepTokens(trace.token_ids[at], trace.positions[at], trace.owners[at]), at


def errors(material: Material) -> dict[str, float]:
    """Signal -> mean error, in experts a layer."""
    trace, parts = material.trace, material.sources.parts
    assert parts.embed is not None
    used = np.array([np.mean([len(its) for its in step]) for step in trace.experts_by_layer()])
    embeddings = [parts.embed(tokens.token_ids).astype(np.float64) for tokens, _ in steps(trace)]
    found = {"last step": np.abs(np.diff(used))[FIRST_STEPS - 1 :].mean()}
    for name, signals_of in SIGNALS.items():
        rows = [signals_of(t, e) for (t, _), e in zip(steps(trace), embeddings, strict=True)]
        fit, off = Fit(len(rows[0])), []
        for row, amount in zip(rows, used.tolist(), strict=True):
            off.append(abs(np.clip(fit.at(row), 0, parts.num_experts) - amount))
            fit.note(row, amount)
        found[name] = np.mean(off[FIRST_STEPS:])
    for name, expected in forecasts(material).items():
        found[name] = np.abs(expected - used)[FIRST_STEPS:].mean()
    return {name: float(error) for name, error in found.items()}


def forecasts(material: Material) -> dict[str, Floats]:
    """What is expected of each step before its first layer, from frequencies of use."""
    trace, parts = material.trace, material.sources.parts
    forecast = forecast_by("frequency", material)
    sums, counts = [], []
    for tokens, at in steps(trace):
        forecast.begin_step(tokens)
        probabilities = forecast.probabilities()
        sums.append(probabilities.sum(axis=1).mean())
        counts.append(covering_experts(probabilities, COVERAGE))
        for layer in range(parts.num_layers):
            routing: tuple[Any, ...] = trace.expert_ids[at, layer], trace.probabilities[at, layer]
            forecast.observe(LayerRouting(layer, *routing))
    return {"frequency, sum": np.array(sums), "frequency, covering": np.array(counts)}


def correlations(material: Material) -> str:
    """Among steps of the most common number of tokens, if that is more than one."""
    trace, parts = material.trace, material.sources.parts
    assert parts.embed is not None
    used = np.array([np.mean([len(its) for its in step]) for step in trace.experts_by_layer()])
    sizes = np.diff(trace.step_bounds)
    size = int(np.bincount(sizes).argmax())
    if size == 1:
        return "most steps have one token"
    batches = [tokens for tokens, _ in steps(trace)]
    alike = [i for i, tokens in enumerate(batches) if tokens.num_tokens == size]
    distance = [token_distance(parts.embed(batches[i].token_ids)) for i in alike]
    distinct = [len(np.unique(batches[i].token_ids)) for i in alike]
    by_distance, by_distinct = (np.corrcoef(x, used[alike])[0, 1] for x in (distance, distinct))
    return (
        f"{len(alike)} steps of {size} tokens: correlation of experts with distance "
        f"{by_distance:.2f}, with distinct tokens {by_distinct:.2f}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--model-path", type=Path, default=DEMO_MODEL)
    options = parser.parse_args(arguments)
    columns: dict[str, dict[str, float]] = {}
    for path in options.traces:
        material = Material(load_trace(path), options.model_path)
        columns[path.stem] = errors(material)
        print(f"{path.stem}: {correlations(material)}")
    print(f"\n| signal | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name in next(iter(columns.values())):
        print(f"| {name} | {' | '.join(f'{its[name]:.2f}' for its in columns.values())} |")


if __name__ == "__main__":
    main()
