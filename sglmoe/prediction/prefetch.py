"""Which experts to bring in next, from what is likely to be used: pure functions."""

from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.memory.prefetch import Wanted
from sglmoe.prediction.predictor import Scores

Mask: TypeAlias = npt.NDArray[np.bool_]  # [num_layers, num_experts]


class PrefetchSnapshot(msgspec.Struct, frozen=True, eq=False):
    """A step at the moment when one of its layers has chosen its experts."""

    layer: int  # that layer; -1 before the first
    probabilities: Scores  # of the layers after it; the other rows mean nothing
    is_resident: Mask  # in a frame, or on its way there
    horizon: int  # so many layers ahead may be fetched for
    num_loads: int  # so many loads may be begun
    min_probability: float  # what is less likely is left alone


class FramePlan(msgspec.Struct, frozen=True):
    """What frames should hold while the layers after this one run."""

    layer_frames: list[int]  # [num_layers]; those that are over have none
    wanted: list[Wanted]  # the absent ones, the most urgent first


def plan_prefetch(snapshot: PrefetchSnapshot) -> list[Wanted]:
    """Absent experts of the next layers, the most urgent first (FineMoE 4.4).

    An expert that is used with probability p so many layers ahead has the priority p / layers. Of
    equals the nearer layer goes first, then the lower number.
    """
    priorities = _priorities(snapshot)
    layers = slice(snapshot.layer + 1, snapshot.layer + 1 + len(priorities))
    priorities[snapshot.is_resident[layers]] = 0
    return _ranked(snapshot, priorities, snapshot.num_loads)


def loads_to_begin(num_under_way: int, *, expert_seconds: float, layer_seconds: float) -> int:
    """How many loads more the link has work for until the next plan is made, a layer later.

    Not as many as fit within the horizon: what is on its way has a frame and is of no use yet, and
    what is begun is not overtaken by what turns out to be needed sooner. On `eval/traces/turns-4`, a
    quarter of the experts in frames and a link that moves 4 in a layer's time, 30 % of the experts are
    hit without prefetching, 44 % with FineMoE's map, and 23 % if as many are on their way as the link
    moves in five layers' time (an oracle: 53 and 40 %; `eval.prefetch_replay --queue-layers`).
    """
    return max(0, int(layer_seconds / expert_seconds) + 1 - num_under_way)


def plan_frames(snapshot: PrefetchSnapshot, num_frames: int) -> FramePlan:
    """Split frames over the layers ahead by predicted use (PLEC: He's ExpertFlow, 3.4).

    `num_frames` are those that the running layer does not need. They go to the most urgent of the
    experts ahead, residents among them. A layer that is over wants nothing, so asking anew at each
    layer hands its frames on to what is still missing. The paper does it as each expert ends and
    gives no formula: "urgent" as in `plan_prefetch` gives the split of its worked example.
    """
    targets = _ranked(snapshot, _priorities(snapshot), num_frames)
    layer_frames = np.bincount(
        np.array([its.layer for its in targets], np.intp), minlength=len(snapshot.probabilities)
    )
    absent = [its for its in targets if not snapshot.is_resident[its.layer, its.expert]]
    return FramePlan(layer_frames.tolist(), absent[: snapshot.num_loads])


def _priorities(snapshot: PrefetchSnapshot) -> npt.NDArray[np.float32]:
    """Of the layers within the horizon: `[layers, num_experts]`, 0 for what is too unlikely."""
    start = snapshot.layer + 1
    probabilities = snapshot.probabilities[start : start + snapshot.horizon]
    layers_ahead = np.arange(1, len(probabilities) + 1, dtype=np.float32)[:, np.newaxis]
    priorities: npt.NDArray[np.float32] = probabilities / layers_ahead
    priorities[probabilities < snapshot.min_probability] = 0
    return priorities


def _ranked(
    snapshot: PrefetchSnapshot, priorities: npt.NDArray[np.float32], limit: int
) -> list[Wanted]:
    """At most `limit` experts of more priority than 0, the highest first."""
    if limit <= 0:
        return []
    flat = priorities.ravel()
    places = np.flatnonzero(flat)
    if len(places) > limit:  # sorting all of them would take ten times as long
        least = np.partition(flat[places], -limit)[-limit]
        places = places[flat[places] >= least]
    places = places[(-flat[places]).argsort(kind="stable")][:limit]
    layers, experts = np.divmod(places, priorities.shape[1])
    layers += snapshot.layer + 1
    probabilities = snapshot.probabilities[layers, experts]
    return [
        Wanted(layer, expert, probability)
        for layer, expert, probability in zip(
            layers.tolist(), experts.tolist(), probabilities.tolist(), strict=True
        )
    ]
