"""Which expert is in which frame.

The table knows residents and pins. It neither picks victims nor moves bytes.
"""

from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.memory.arena import FrameKind, Frames

ABSENT = -1

ExpertIds: TypeAlias = npt.NDArray[np.intp]  # distinct experts of one layer: [num_experts]
NO_EXPERTS: ExpertIds = np.empty(0, np.intp)


class Load(msgspec.Struct, frozen=True, gc=False):
    """Bring an expert's bytes into a frame."""

    frame: int
    layer: int
    expert: int


class ExpertTable:
    """The residents, and which of them are pinned: experts of one layer at a time.

    `frame_table` is int32 `[num_layers, num_experts]`, ABSENT where an expert is; its address never
    changes.
    """

    def __init__(self, num_layers: int, num_experts: int, *, frames: Frames):
        self.frame_table: npt.NDArray[np.int32] = np.full(
            (num_layers, num_experts), ABSENT, np.int32
        )
        self.num_resident = [0] * num_layers
        self._frames = frames
        self.pinned = NO_EXPERTS  # of `_pinned_layer`
        self._pinned_layer = 0

    def pin(self, layer: int, experts: ExpertIds) -> None:
        """Keep these residents, and no others, from being evicted."""
        self._pinned_layer = layer
        self.pinned = experts

    def unpin(self) -> None:
        self.pinned = NO_EXPERTS

    def is_evictable(self, layer: int, expert: int) -> bool:
        """Whether the expert is resident and has no pin."""
        if self.frame_table[layer, expert] == ABSENT:
            return False
        return layer != self._pinned_layer or expert not in self.pinned

    def evictable(self) -> npt.NDArray[np.bool_]:
        """`is_evictable` of all: bool `[num_layers, num_experts]`."""
        evictable: npt.NDArray[np.bool_] = self.frame_table != ABSENT
        if len(self.pinned):  # never in a model without experts
            evictable[self._pinned_layer, self.pinned] = False
        return evictable

    def place(self, load: Load) -> None:
        """Note that the bytes of an absent expert are in the frame, which it owns."""
        assert self.frame_table[load.layer, load.expert] == ABSENT, f"{load} is resident already"
        self.frame_table[load.layer, load.expert] = load.frame
        self.num_resident[load.layer] += 1

    def evict(self, layer: int, expert: int) -> None:
        """Give the frame of a resident without a pin back."""
        assert self.is_evictable(layer, expert), f"layer {layer} expert {expert} can't be evicted"
        self._frames.give(int(self.frame_table[layer, expert]))
        self.frame_table[layer, expert] = ABSENT
        self.num_resident[layer] -= 1

    def violations(self) -> list[str]:
        """Table and frame owners are one to one; pinned means resident; counters are right."""
        owners = {
            self._frames.expert(frame): frame
            for frame in range(len(self._frames))
            if self._frames.kind(frame) is FrameKind.EXPERT
        }
        residents = {
            (layer, expert): int(self.frame_table[layer, expert])
            for layer, expert in np.argwhere(self.frame_table != ABSENT).tolist()
        }
        found = []
        if residents != owners or len(owners) != self._frames.num_expert:
            found.append("resident experts and owners of frames are not one to one")
        if any(self.frame_table[self._pinned_layer, expert] == ABSENT for expert in self.pinned):
            found.append("an absent expert is pinned")
        if (self.frame_table != ABSENT).sum(axis=1).tolist() != self.num_resident:
            found.append(f"residents by layer are counted wrong: {self.num_resident}")
        return found
