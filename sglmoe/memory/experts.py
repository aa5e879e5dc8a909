"""Which expert is in which frame.

The table knows residents, pins and hit counts. It neither picks victims nor moves bytes.
"""

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.memory.arena import FrameKind, Frames
from sglmoe.memory.eviction import Evictable, EvictionOrder, Tenant

ABSENT = -1


class Load(msgspec.Struct, frozen=True, gc=False):
    """Bring an expert's bytes into a frame."""

    frame: int
    layer: int
    expert: int


class Expert(Evictable):
    """One expert of one layer. `frame` is ABSENT while it isn't resident."""

    __slots__ = ("expert", "frame", "layer", "pinned")

    tenant = Tenant.EXPERT

    def __init__(self, layer: int, expert: int):
        super().__init__()
        self.layer = layer
        self.expert = expert
        self.frame = ABSENT
        self.pinned = False

    @property
    def is_evictable(self) -> bool:
        return self.frame >= 0 and not self.pinned


class ExpertTable:
    """The residents. Enters those without a pin into `order`.

    `frame_table` is int32 `[num_layers, num_experts]`, -1 where an expert is absent; its address
    never changes.
    """

    def __init__(self, num_layers: int, num_experts: int, *, frames: Frames, order: EvictionOrder):
        self.frame_table: npt.NDArray[np.int32] = np.full(
            (num_layers, num_experts), ABSENT, np.int32
        )
        self._experts = [
            [Expert(layer, expert) for expert in range(num_experts)] for layer in range(num_layers)
        ]
        self._frames = frames
        self._order = order
        self.num_pinned = 0
        self.hits = 0
        self.misses = 0

    def layer(self, layer: int) -> Sequence[Expert]:
        """The layer's experts, by id."""
        return self._experts[layer]

    def place(self, expert: Expert, frame: int) -> None:
        """Note that the bytes of an absent expert are in `frame`, which it owns, and pin it."""
        assert expert.frame < 0, f"layer {expert.layer} expert {expert.expert} is resident already"
        expert.frame = frame
        self.frame_table[expert.layer, expert.expert] = frame
        self.pin([expert])

    def evict(self, expert: Expert) -> None:
        """Give the frame of a resident without a pin back."""
        assert expert.is_evictable, f"layer {expert.layer} expert {expert.expert} can't be evicted"
        self._frames.give(expert.frame)
        expert.frame = ABSENT
        self.frame_table[expert.layer, expert.expert] = ABSENT

    def pin(self, experts: Sequence[Expert]) -> None:
        """Keep residents, none of them pinned, from being evicted."""
        for expert in experts:
            expert.pinned = True
        self.num_pinned += len(experts)

    def unpin(self, experts: Sequence[Expert]) -> None:
        """Undo `pin`; they count as used now."""
        order = self._order
        for expert in experts:
            expert.pinned = False
            order.touch(expert)
            if not expert.queued:
                order.add(expert)
        self.num_pinned -= len(experts)

    def violations(self) -> list[str]:
        """Table and frame owners are one to one; pinned means resident; counters are right."""
        experts = [expert for row in self._experts for expert in row]
        owners = {
            frame: self._frames.expert(frame)
            for frame in range(len(self._frames))
            if self._frames.kind(frame) is FrameKind.EXPERT
        }
        residents = [expert for expert in experts if expert.frame >= 0]
        found = []
        if {expert.frame: (expert.layer, expert.expert) for expert in residents} != owners or len(
            residents
        ) != len(owners):
            found.append("resident experts and owners of frames are not one to one")
        if not np.array_equal(self.frame_table.ravel(), _frames_of(experts)):
            found.append("the frame table is not where the experts are")
        if any(expert.pinned and expert.frame < 0 for expert in experts):
            found.append("an absent expert is pinned")
        if sum(expert.pinned for expert in experts) != self.num_pinned:
            found.append(f"pinned experts are counted wrong: {self.num_pinned}")
        evictable: set[Evictable] = {expert for expert in experts if expert.is_evictable}
        return found + self._order.violations(Tenant.EXPERT, evictable)


def _frames_of(experts: Iterable[Expert]) -> npt.NDArray[np.int32]:
    return np.fromiter((expert.frame for expert in experts), np.int32)
