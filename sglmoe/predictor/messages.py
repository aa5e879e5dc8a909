"""What the worker tells the predictor, and what it is told: one machine, so arrays travel as their bytes."""

import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.memory.prefetch import Wanted
from sglmoe.prediction.advisor import LinkTimes


class Message(msgspec.Struct, frozen=True, tag=True):
    """Whatever is sent."""


class StepBegun(Message, frozen=True):
    """T tokens are about to be computed."""

    step: int
    token_ids: bytes  # int32 [T], as the two below
    positions: bytes
    owners: bytes
    embeddings: bytes  # float32 [T, hidden], or none
    ended: Sequence[int]  # owners that are no more; their numbers may be in `owners` again
    frames: bytes  # int32 [num_layers, num_experts]: memory's frame table
    times: LinkTimes
    late: int  # prefetches of the step before that were late, and those that were of no use
    unused: int
    wants_advice: bool  # in this step; if not, predictors learn from it and that is all


class LayerRouted(Message, frozen=True):
    """The step's next layer has chosen its experts, and has not asked memory for them."""

    layer: int
    num_tokens: int
    expert_ids: bytes  # int32 [T, top_k]
    logits: bytes  # float32 [T, num_experts], or none
    gate_input: bytes  # float32 [T, hidden], or none
    frames: bytes  # int32 [rows, num_experts]: of all layers, or of this one and some after it


class Closed(Message, frozen=True):
    """The last one."""


Event: TypeAlias = StepBegun | LayerRouted | Closed


class Wishes(msgspec.Struct, frozen=True):
    """What those that are heard make use of: telling what nobody wants takes the forward pass time."""

    logits: bool = True
    gate_input: bool = True
    embeddings: bool = True
    layers_ahead: int = sys.maxsize  # after a routed one: whose frames


class AdvisorReport(msgspec.Struct, frozen=True):
    """How good the advice has been: `protocol.PrefetchReport` says what the fields mean."""

    predictor: str = ""
    reason: str = ""
    horizon_layers: int = 0
    precision: float = 0.0
    recall: float = 0.0
    batch_accuracy: float = 0.0
    coverage: dict[str, float] = {}
    recall_by_layer: tuple[float, ...] = ()


class Status(Message, frozen=True):
    """Once a step."""

    wishes: Wishes
    report: AdvisorReport | None = None  # now and then


class Advice(Message, frozen=True):
    """What is to come after a layer of a step, -1: before the first one (`advisor.Outlook`)."""

    step: int
    layer: int
    probabilities: bytes  # float32 [num_layers, num_experts]
    wanted: Sequence[Wanted]


class Ready(Message, frozen=True):
    """The predictor's process listens."""


class Failed(Message, frozen=True):
    """The predictor's last words."""

    error: str


Answer: TypeAlias = Ready | Status | Advice | Failed


def array_bytes(array: npt.NDArray[Any], dtype: npt.DTypeLike) -> bytes:
    return array.astype(dtype, copy=False).tobytes()


def rows(data: bytes, dtype: npt.DTypeLike, num_rows: int) -> npt.NDArray[Any]:
    """A matrix of so many rows, read-only; one of no columns if there is nothing."""
    return np.frombuffer(data, dtype).reshape(num_rows, -1 if num_rows else 0)
