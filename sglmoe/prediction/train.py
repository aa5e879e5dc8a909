"""Train a predictor of experts on recorded routing traces.

    python -m sglmoe.prediction.train --model-path MODEL --trace A.npz B.npz \\
        --predictor routing_path --output FOLDER [--test C.npz ...]

A tenth of each trace's requests are kept to test with; `--test` adds whole traces, of other text or
batch sizes. Writes NAME.safetensors and NAME.json (what it is, and how good) and NAME.png.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from sglmoe.errors.options import no_epochs
from sglmoe.prediction.hybrid_command import train_hybrid, with_gate_inputs
from sglmoe.prediction.routing_path_training import train_routing_path
from sglmoe.prediction.saved import Description, description_path, save_predictor, tensors_path
from sglmoe.prediction.training_data import Fitted, TrainingData, load_parts, split, vocab_size_of
from sglmoe.prediction.training_report import compare, plot, table

TRAINERS: Mapping[str, Callable[[TrainingData], Fitted]] = {
    "routing_path": train_routing_path,
    "hybrid": train_hybrid,
}
WANT_GATE_INPUTS = ("hybrid",)

HELD_OUT_RATIO = 0.1  # of the requests of each trace, as in He et al.
INTERRUPTED = 130  # as of a process that SIGINT ended


def run(options: argparse.Namespace) -> None:
    """Train, test and write. Raises ValueError for traces that don't go together."""
    if options.epochs is not None and options.epochs < 1:
        raise no_epochs(num_epochs=options.epochs)
    shape, parts = load_parts([*options.trace, *options.test], vocab_size_of(options.model_path))
    if options.predictor in WANT_GATE_INPUTS:
        parts = with_gate_inputs(parts, options.model_path)
    taught, tests = parts[: len(options.trace)], parts[len(options.trace) :]
    train, held_out = split(taught, held_out_ratio=HELD_OUT_RATIO, seed=options.seed)
    trainer = TRAINERS[options.predictor]
    fitted = trainer(
        TrainingData(options.model_path, shape, train, held_out, options.seed, options.epochs)
    )
    measured = compare(options.predictor, fitted.new_predictor, [*held_out, *tests])
    print(table(measured))
    description = Description(
        predictor=options.predictor,
        model=parts[0].trace.info.model,
        shape=shape,
        settings=fitted.settings,
        trained_on=[f"{part.name}: {part.num_tokens} tokens" for part in train],
        report={"losses": fitted.losses, "measured": msgspec.to_builtins(measured)},
    )
    save_predictor(options.output, description, fitted.tensors)
    try:
        plot(measured, fitted.losses, options.output / f"{options.predictor}.png")
    except ImportError as error:
        print(f"\nno plot: {error} (pip install 'sglmoe[eval]')")
    num_bytes = tensors_path(options.output, options.predictor).stat().st_size
    print(
        f"\n{description_path(options.output, options.predictor)}, with {num_bytes:,} bytes of tensors"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", type=Path, required=True, help="the model's folder")
    parser.add_argument("--trace", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, nargs="+", default=[])
    parser.add_argument("--predictor", choices=TRAINERS, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        run(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; no file is half written", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
