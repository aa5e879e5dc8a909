"""Packed experts in the arena: which frames hold them, and where in these frames each of them lies.

Frames are taken one by one, wherever they are. Put in the order of their places they are one run of bytes, cut into
equal cells of one packed expert each; so a cell may begin in one frame and end in another. Five frames then hold seven
experts at the codec's 0.706 without having to be neighbours, and whoever takes one of them back costs the two or three
experts that have bytes in it. All of these are copies: dropping one loses nothing but time.

Knows neither bytes nor values. Main thread only.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglmoe.memory.arena import FrameKind, Frames
from sglmoe.memory.expert_values import Values
from sglmoe.memory.experts import ABSENT, PackedCell


class PackedSlabs:
    """`cell_bytes` is what the largest expert takes packed, no more than a frame. 0: none ever will be.

    An expert that should be here has a cell, which is filled when its packed bytes come by. A cell stays while a load reads
    or fills it.
    """

    def __init__(
        self, frames: Frames, shape: tuple[int, int], *, frame_bytes: int, cell_bytes: int
    ):
        assert cell_bytes <= frame_bytes
        self.is_packed: npt.NDArray[np.bool_] = np.zeros(shape, np.bool_)  # with a filled cell
        self.hits = 0  # loads that were decoded from here, since the start
        self.kept = 0  # cells that were filled, likewise
        self.num_changes = 0  # of what is to be held, and of where
        self._frames = frames
        self._num_experts = shape[1]
        self._frame_bytes, self._cell_bytes = frame_bytes, cell_bytes
        self._frame_at: list[int] = []  # place -> frame; ABSENT: a gap
        self._gaps: list[int] = []  # a heap of places
        # Cell -> number of the expert that has it, filled or not; ABSENT: nobody.
        self._expert_at: npt.NDArray[np.intp] = np.empty(0, np.intp)
        self._cell_of: npt.NDArray[np.intp] = np.full(shape, ABSENT, np.intp)
        self._in_use: dict[tuple[int, int], int] = {}  # loads under way -> the cell

    @property
    def can_hold(self) -> bool:
        return self._cell_bytes > 0

    @property
    def num_frames(self) -> int:
        return len(self._frame_at) - len(self._gaps)

    def held_frames(self) -> list[int]:
        return [frame for frame in self._frame_at if frame != ABSENT]

    @property
    def num_cells(self) -> int:
        """All of whose bytes are there."""
        return len(self._whole_cells())

    # ---------------------------------------------------------------------------------- frames

    def grow(self) -> None:
        """Take a free frame, of which there must be one."""
        assert self.can_hold
        frame = self._frames.take_for_packed()
        if self._gaps:
            self._frame_at[heapq.heappop(self._gaps)] = frame
        else:
            self._frame_at.append(frame)
            num_new = len(self._frame_at) * self._frame_bytes // self._cell_bytes
            num_new -= len(self._expert_at)
            self._expert_at = np.append(self._expert_at, np.full(num_new, ABSENT, np.intp))
        self.num_changes += 1

    def give_back(self, place: int) -> None:
        """Make a frame free, and forget the experts that have bytes in it; none may be in use."""
        assert self.may_go(place), f"place {place} is empty or in use"
        for cell in self._cells_in(place):
            self._forget(cell)
        self._frames.give(self._frame_at[place])
        self._frame_at[place] = ABSENT
        heapq.heappush(self._gaps, place)

    def give_all_back(self) -> None:
        """Forget all; no load may be under way."""
        for place, frame in enumerate(self._frame_at):
            if frame != ABSENT:
                self.give_back(place)

    def may_go(self, place: int) -> bool:
        """Whether there is a frame that no load uses."""
        return self._frame_at[place] != ABSENT and place not in self._used_places()

    @property
    def num_used_frames(self) -> int:
        """That loads under way read or fill."""
        return len(self._used_places())

    def losses(self, worth: Values) -> Values:
        """What goes with the frame of each place, where `worth` is each expert's: the sum over those that have a cell in
        it, `[num_places]`; infinite for gaps and what is in use."""
        cells = np.where(self._expert_at == ABSENT, 0.0, worth.ravel()[self._expert_at])
        sums = np.concatenate([[0.0], np.cumsum(cells)])
        places = np.arange(len(self._frame_at) + 1) * self._frame_bytes
        first = np.minimum(places[:-1] // self._cell_bytes, len(cells))
        stop = np.minimum(-(-places[1:] // self._cell_bytes), len(cells))
        losses: Values = sums[stop] - sums[first]
        losses[[*self._gaps, *self._used_places()]] = np.inf
        return losses

    # --------------------------------------------------------------------------------- experts

    def hold(self, experts: Sequence[tuple[int, int]]) -> None:
        """From now on these should be here, the most wanted first, as far as there are cells; all others are forgotten.

        No load may be under way.
        """
        assert not self._in_use
        whole = self._whole_cells()
        wanted = list(experts[: len(whole)])
        numbers = [self._number(key) for key in wanted]
        for cell in np.flatnonzero(~np.isin(self._expert_at, [ABSENT, *numbers])).tolist():
            self._forget(cell)
        free = [cell for cell in whole if self._expert_at[cell] == ABSENT]
        new = [key for key in wanted if self._cell_of[key] == ABSENT]
        for key, cell in zip(new, free, strict=False):
            self._cell_of[key] = cell
            self._expert_at[cell] = self._number(key)
        self.num_changes += 1

    def begin(self, layer: int, expert: int) -> PackedCell | None:
        """A load of this expert begins: its cell, if it has one, stays until `end`."""
        cell = int(self._cell_of[layer, expert])
        if cell == ABSENT:
            return None
        assert (layer, expert) not in self._in_use
        self._in_use[layer, expert] = cell
        return PackedCell(self._runs(cell), is_filled=bool(self.is_packed[layer, expert]))

    def end(self, layer: int, expert: int, *, is_there: bool) -> None:
        """The load is over, and the expert with its packed bytes is there; or it has failed."""
        if self._in_use.pop((layer, expert), None) is None or not is_there:
            return
        if self.is_packed[layer, expert]:
            self.hits += 1
        else:
            self.is_packed[layer, expert] = True
            self.kept += 1

    # ----------------------------------------------------------------------------------- layout

    def _runs(self, cell: int) -> tuple[tuple[int, int], ...]:
        """Its bytes in the arena, place by place."""
        start, stop = cell * self._cell_bytes, (cell + 1) * self._cell_bytes
        runs = []
        for place in self._places_of(cell):
            first = place * self._frame_bytes
            offset = self._frame_at[place] * self._frame_bytes - first
            part = max(start, first), min(stop, first + self._frame_bytes)
            runs.append((offset + part[0], offset + part[1]))
        return tuple(runs)

    def _places_of(self, cell: int) -> range:
        start, stop = cell * self._cell_bytes, (cell + 1) * self._cell_bytes
        return range(start // self._frame_bytes, -(-stop // self._frame_bytes))

    def _cells_in(self, place: int) -> range:
        start, stop = place * self._frame_bytes, (place + 1) * self._frame_bytes
        last = min(-(-stop // self._cell_bytes), len(self._expert_at))
        return range(start // self._cell_bytes, last)

    def _whole_cells(self) -> list[int]:
        broken = {cell for place in self._gaps for cell in self._cells_in(place)}
        return [cell for cell in range(len(self._expert_at)) if cell not in broken]

    def _used_places(self) -> set[int]:
        return {place for cell in self._in_use.values() for place in self._places_of(cell)}

    def _number(self, key: tuple[int, int]) -> int:
        return key[0] * self._num_experts + key[1]

    def _forget(self, cell: int) -> None:
        number = int(self._expert_at[cell])
        if number != ABSENT:
            key = divmod(number, self._num_experts)
            self.is_packed[key], self._cell_of[key] = False, ABSENT
            self._expert_at[cell] = ABSENT

    # ------------------------------------------------------------------------------------- laws

    def violations(self) -> list[str]:
        """Frames and places are one to one, experts and cells too; what is filled or in use has a cell whose bytes are
        all there."""
        kinds = (self._frames.kind(frame) for frame in range(len(self._frames)))
        marked = [frame for frame, kind in enumerate(kinds) if kind is FrameKind.PACKED]
        gaps = [place for place, frame in enumerate(self._frame_at) if frame == ABSENT]
        cells = {
            self._number((layer, expert)): int(self._cell_of[layer, expert])
            for layer, expert in np.argwhere(self._cell_of != ABSENT).tolist()
        }
        experts = {
            int(number): cell
            for cell, number in enumerate(self._expert_at.tolist())
            if number != ABSENT
        }
        found = []
        if sorted(self.held_frames()) != marked:
            found.append("the frames of packed experts differ from the frames marked packed")
        if sorted(self._gaps) != gaps:
            found.append("the gaps among packed frames are on record elsewhere")
        if cells != experts:
            found.append("packed experts and the cells that they have are not one to one")
        if not set(experts.values()) <= set(self._whole_cells()):
            found.append("an expert has a packed cell part of which is gone")
        if (self.is_packed & (self._cell_of == ABSENT)).any():
            found.append("an expert is packed that has no cell")
        if any(self._cell_of[key] != cell for key, cell in self._in_use.items()):
            found.append("a load uses a packed cell that is not its expert's")
        return found
