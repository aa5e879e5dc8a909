"""Which expert is in which frame.

The table knows residents and pins. It neither picks victims nor moves bytes.
"""

from collections import Counter
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.memory.arena import FrameKind, Frames

ABSENT = -1

ExpertIds: TypeAlias = npt.NDArray[np.intp]  # distinct experts of one layer: [num_experts]
NO_EXPERTS: ExpertIds = np.empty(0, np.intp)


class PackedCell(msgspec.Struct, frozen=True, gc=False):
    """Where in the arena an expert lies packed, or is to be kept so."""

    runs: tuple[tuple[int, int], ...]  # of bytes, (start, stop), one after the other
    is_filled: bool


class Load(msgspec.Struct, frozen=True, gc=False):
    """Bring an expert's bytes into a frame: from the cell, if it is filled; if not, fill that too."""

    frame: int
    layer: int
    expert: int
    cell: PackedCell | None = None

    @property
    def is_packed(self) -> bool:
        """Whether its bytes are in the arena."""
        return self.cell is not None and self.cell.is_filled


class ExpertTable:
    """The residents, which of them are pinned: experts of one layer at a time, and those on their way.

    `frame_table` is int32 `[num_layers, num_experts]`, ABSENT where an expert is; its address never
    changes.
    """

    def __init__(self, num_layers: int, num_experts: int, *, frames: Frames):
        self.frame_table: npt.NDArray[np.int32] = np.full(
            (num_layers, num_experts), ABSENT, np.int32
        )
        self.num_resident = [0] * num_layers
        self.loading: dict[tuple[int, int], Load] = {}  # those on their way, the oldest first
        self.num_loading = [0] * num_layers  # of them, in each layer
        # Residents that a prefetch has brought and nothing has used since; and how many of these were evicted.
        self.is_unused: npt.NDArray[np.bool_] = np.zeros((num_layers, num_experts), np.bool_)
        self.num_unused_evicted = 0
        self._frames = frames
        self.pinned = NO_EXPERTS  # of `_pinned_layer`
        self.num_awaited = (
            0  # on their way because this layer needs them: nobody can have their frames
        )
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

    def evictable_of(self, layer: int) -> npt.NDArray[np.bool_]:
        """`is_evictable` of one layer: bool `[num_experts]`."""
        evictable: npt.NDArray[np.bool_] = self.frame_table[layer] != ABSENT
        if layer == self._pinned_layer:
            evictable[self.pinned] = False
        return evictable

    def begin(self, load: Load) -> None:
        """Note that an absent expert is on its way into the frame, which it owns."""
        key = load.layer, load.expert
        assert self.frame_table[key] == ABSENT, f"{load} is resident already"
        assert key not in self.loading, f"{load} is under way"
        self.loading[key] = load
        self.num_loading[load.layer] += 1

    def end(self, load: Load, *, is_there: bool, is_used: bool = False) -> None:
        """The expert has arrived and is a resident, used now or not yet; or its frame is free again."""
        del self.loading[load.layer, load.expert]
        self.num_loading[load.layer] -= 1
        if is_there:
            self.place(load)
            self.is_unused[load.layer, load.expert] = not is_used
        else:
            self._frames.give(load.frame)

    def use(self, layer: int | ExpertIds, residents: ExpertIds) -> int:
        """Note that these, each of its layer, are used; how many of them a prefetch has brought and nothing had used."""
        num_unused = int(np.count_nonzero(self.is_unused[layer, residents]))
        if num_unused:
            self.is_unused[layer, residents] = False
        return num_unused

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
        if self.is_unused[layer, expert]:
            self.is_unused[layer, expert] = False
            self.num_unused_evicted += 1

    def replace(
        self,
        layers: npt.NDArray[np.intp],
        evicted: ExpertIds,
        newcomers: ExpertIds,
        *,
        frames: npt.NDArray[np.int32],
    ) -> None:
        """Give the frames to absent newcomers, each in the stead of a resident of its layer or of nobody (ABSENT)."""
        gave = evicted != ABSENT
        old = layers[gave], evicted[gave]
        self.num_unused_evicted += self.use(*old)
        self.frame_table[old] = ABSENT
        assert (self.frame_table[layers, newcomers] == ABSENT).all(), "a newcomer is a resident"
        self.frame_table[layers, newcomers] = frames
        for layer in layers[~gave].tolist():
            self.num_resident[layer] += 1
        keys = zip(layers.tolist(), newcomers.tolist(), strict=True)
        self._frames.assign(dict(zip(frames.tolist(), keys, strict=True)))

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
        on_their_way = {key: load.frame for key, load in self.loading.items()}
        found = []
        if residents.keys() & on_their_way.keys():
            found.append("a resident expert is on its way")
        if residents | on_their_way != owners or len(owners) != self._frames.num_expert:
            found.append("experts that have a frame and owners of frames are not one to one")
        if any(self.frame_table[self._pinned_layer, expert] == ABSENT for expert in self.pinned):
            found.append("an absent expert is pinned")
        if (self.frame_table != ABSENT).sum(axis=1).tolist() != self.num_resident:
            found.append(f"residents by layer are counted wrong: {self.num_resident}")
        if Counter(layer for layer, _ in self.loading) != Counter(
            {layer: count for layer, count in enumerate(self.num_loading) if count}
        ):
            found.append(f"those on their way are counted wrong: {self.num_loading}")
        if (self.is_unused & (self.frame_table == ABSENT)).any():
            found.append("an absent expert is a prefetched resident")
        return found
