"""What packed experts in the arena are worth, and which of their frames is the next to go.

An expert that is packed saves its load less its decoding, as often as it is used; one that is in a frame as well saves
with the frame only its decoding. Both are in the one currency: seconds per byte and step.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sglmoe.memory.arena import Frames
from sglmoe.memory.eviction import Clock
from sglmoe.memory.expert_values import ExpertValues, Probabilities, Values
from sglmoe.memory.experts import ExpertIds
from sglmoe.memory.packed_slabs import PackedSlabs


class Packing(NamedTuple):
    """What packed experts take and save in the arena. With a `share` they have that share of the frames that KV leaves,
    whatever they save."""

    expert_bytes: int = 0  # packed, of the largest; 0: none is ever packed
    # What decoding one takes, as a share of what loading one takes.
    decode_ratio: Callable[[], float] = lambda: 1.0
    share: float | None = None


NO_PACKING = Packing()


class PackedFrame(NamedTuple):
    """The frame of a place, and what a byte of it saves: at least `value` is lost with it."""

    place: int
    value: float


class FrameValues:
    """What frames of experts are worth: those of experts that are packed too, their decoding."""

    def __init__(
        self,
        values: ExpertValues,
        is_packed: npt.NDArray[np.bool_],
        decode_ratio: Callable[[], float],
    ):
        self._values = values
        self._is_packed = is_packed
        self._decode_ratio = decode_ratio

    def now(self) -> Values:
        values = self._values.now()
        return np.where(self._is_packed, self._decode_ratio() * values, values)

    def begin_step(self) -> None:
        self._values.begin_step()

    def use(self, layer: int, experts: ExpertIds) -> None:
        self._values.use(layer, experts)

    def expect(self, layer: int, probabilities: Probabilities) -> None:
        self._values.expect(layer, probabilities)

    def demand(self) -> Values:
        return self._values.demand()

    def clear(self) -> None:
        self._values.clear()


class PackedOrder:
    """Packed frames by what is lost with them, the least first. Values are looked at once a layer.

    With a `share`, packed experts have that share of the frames that KV leaves, whatever they are worth: a frame beyond it
    goes before any expert, others after all.
    """

    def __init__(
        self,
        slabs: PackedSlabs,
        values: ExpertValues,
        packing: Packing,
        *,
        frames: Frames,
        clock: Clock,
    ):
        self._slabs = slabs
        self._values = values
        self._packing = packing
        self._frames = frames
        self._clock = clock
        self._seen: tuple[int, int] | None = None  # when values were looked at
        self._candidates: list[PackedFrame] = []  # as of then, the next to go last

    def first(self) -> PackedFrame | None:
        """The frame to give back next; None where there is none, or loads use all."""
        if not self._slabs.num_frames:
            return None
        now = self._clock.now, self._slabs.num_changes
        if now == self._seen and (frame := self._next()):
            return frame
        self._seen, self._candidates = now, self._sorted()
        return self._next()

    def _next(self) -> PackedFrame | None:
        while self._candidates:
            if self._slabs.may_go(self._candidates[-1].place):
                return self._in_share(self._candidates[-1])
            self._candidates.pop()
        return None

    def _in_share(self, frame: PackedFrame) -> PackedFrame:
        share = self._packing.share
        if share is None:
            return frame
        is_beyond = self._slabs.num_frames > int(share * (len(self._frames) - self._frames.num_kv))
        return frame._replace(value=-math.inf if is_beyond else math.inf)

    def _sorted(self) -> list[PackedFrame]:
        losses = self._slabs.losses((1 - self._packing.decode_ratio()) * self._values.now())
        places = losses.argsort(kind="stable")[::-1]
        return [*map(PackedFrame, places.tolist(), losses[places].tolist())]
