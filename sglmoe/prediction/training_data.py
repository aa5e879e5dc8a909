"""Recorded traces as examples: which requests teach a predictor and which ones test it."""

import json
import random
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.errors import predictors
from sglmoe.prediction.predictor import ModelParts, Predictor
from sglmoe.prediction.saved import ServedShape, Tensors
from sglmoe.prediction.trace import Trace, load_trace


class TracePart(msgspec.Struct, frozen=True, eq=False):
    """Some requests of a trace."""

    name: str
    trace: Trace
    requests: npt.NDArray[np.bool_]  # [R]: those that count
    gate_inputs: npt.NDArray[np.float32] | None = None  # [T, layers, hidden], where they are wanted

    @property
    def num_tokens(self) -> int:
        return int(self.requests[self.trace.owners].sum())


class TrainingData(msgspec.Struct, frozen=True, eq=False):
    """What a trainer is given."""

    model_path: Path
    shape: ServedShape
    train: list[TracePart]
    held_out: list[TracePart]
    seed: int
    epochs: int | None  # None: as many as the trainer finds right


class Fitted(msgspec.Struct, frozen=True, eq=False):
    """What a trainer gives back."""

    settings: dict[str, Any]  # what the predictor needs beside
    tensors: Tensors
    new_predictor: Callable[[ModelParts], Predictor]  # with these, rounded as they are written
    losses: list[dict[str, float]]  # by epoch: "train", "held_out"


def load_parts(paths: Sequence[Path], vocab_size: int) -> tuple[ServedShape, list[TracePart]]:
    """Whole traces, and the shape of the model that they are of.

    Raises ValueError, naming the files, where they are of different models, or of another vocabulary.
    """
    parts = [whole(path) for path in paths]
    first = parts[0].trace.info
    for path, part in zip(paths, parts, strict=True):
        info = part.trace.info
        if describe(part.trace) != describe(parts[0].trace):
            raise predictors.traces_of_two_models(
                first=paths[0],
                its_model=describe(parts[0].trace),
                path=path,
                model=describe(part.trace),
            )
        largest = int(part.trace.token_ids.max())
        if largest >= vocab_size:
            raise predictors.trace_of_another_vocabulary(
                path=path, token_id=largest, last_id=vocab_size - 1, model=info.model
            )
    return ServedShape(first.num_layers, first.num_experts, first.top_k, vocab_size), parts


def whole(path: Path) -> TracePart:
    try:
        trace = load_trace(path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise predictors.bad_trace(path=path, why=str(error)) from error
    return TracePart(path.stem, trace, np.ones(len(trace.request_bounds) - 1, bool))


def describe(trace: Trace) -> str:
    its = trace.info
    return f"{its.model} ({its.num_layers} layers of {its.num_experts} experts, top {its.top_k})"


def split(
    parts: Sequence[TracePart], *, held_out_ratio: float, seed: int
) -> tuple[list[TracePart], list[TracePart]]:
    """Each trace's requests at random, to learn from and to test with: at least one of either kind.

    Raises ValueError for a trace of a single request.
    """
    rng = random.Random(seed)
    train, held_out = [], []
    for part in parts:
        num_requests = len(part.requests)
        if num_requests < 2:
            raise predictors.single_request(name=part.name)
        num_tested = min(max(1, round(held_out_ratio * num_requests)), num_requests - 1)
        tested = np.zeros(num_requests, bool)
        tested[rng.sample(range(num_requests), num_tested)] = True
        train.append(msgspec.structs.replace(part, requests=~tested))
        held_out.append(msgspec.structs.replace(part, requests=tested))
    return train, held_out


def vocab_size_of(model_path: Path) -> int:
    """Of the model in a folder. Raises ValueError where its configuration doesn't say."""
    path = model_path / "config.json"
    if not path.is_file():
        raise predictors.no_model_folder(model_path=model_path)
    config = json.loads(path.read_text())
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise predictors.no_vocabulary(path=path)
    return size
