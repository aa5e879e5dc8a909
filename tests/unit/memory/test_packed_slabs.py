"""Frames that hold packed experts: of 100 bytes each, a cell has 70. 2 layers of 6 experts.

place   0         1         2         3         4
cell    0      1      2      3      4      5      6
bytes   0-69   70-139 140-  210-  280-  350-  420-489
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglmoe.memory.arena import Frames
from sglmoe.memory.experts import PackedCell
from sglmoe.memory.packed_slabs import PackedSlabs

SHAPE = 2, 6
EXPERTS = [(layer, expert) for layer in range(2) for expert in range(6)]


class Slabs(PackedSlabs):
    def __init__(self, num_held: int = 0, *, num_frames: int = 8):
        self.frames = Frames(num_frames)
        super().__init__(self.frames, SHAPE, frame_bytes=100, cell_bytes=70)
        for _ in range(num_held):
            self.grow()

    def keep(self, *experts: tuple[int, int]) -> None:
        """Each is loaded, and its packed bytes come by."""
        for layer, expert in experts:
            cell = self.begin(layer, expert)
            assert cell is None or not cell.is_filled
            self.end(layer, expert, is_there=True)
        assert self.violations() == []

    @property
    def held(self) -> list[tuple[int, int]]:
        return [(layer, expert) for layer, expert in np.argwhere(self.is_packed).tolist()]


def test_five_frames_hold_seven_experts() -> None:
    assert [Slabs(number).num_cells for number in range(6)] == [0, 1, 2, 4, 5, 7]
    slabs = Slabs(5)
    slabs.hold(EXPERTS)
    slabs.keep(*EXPERTS)
    assert slabs.held == EXPERTS[:7], "those wanted most"
    assert (slabs.kept, slabs.frames.num_packed, slabs.frames.num_free) == (7, 5, 3)


def test_a_cell_may_begin_in_one_frame_and_end_in_any_other() -> None:
    slabs = Slabs()
    for taken in (2, 1):  # KV has frames 0 and 1, and 3; so packed experts get 2, then 4
        for _ in range(taken):
            slabs.frames.take_for_kv()
        slabs.grow()
    slabs.hold([(0, 0), (0, 1)])
    assert slabs.begin(0, 0) == PackedCell(((200, 270),), is_filled=False)
    assert slabs.begin(0, 1) == PackedCell(((270, 300), (400, 440)), is_filled=False)


def test_an_expert_is_decoded_from_its_cell_once_that_was_filled() -> None:
    slabs = Slabs(2)
    slabs.hold([(1, 3)])
    assert slabs.begin(1, 4) is None
    slabs.end(1, 4, is_there=True)
    assert slabs.held == []
    slabs.begin(1, 3)
    slabs.end(1, 3, is_there=False)  # the disk failed
    assert slabs.begin(1, 3) == PackedCell(((0, 70),), is_filled=False)
    slabs.end(1, 3, is_there=True)
    assert slabs.begin(1, 3) == PackedCell(((0, 70),), is_filled=True)
    slabs.end(1, 3, is_there=True)
    assert (slabs.hits, slabs.kept) == (1, 1)


def test_a_frame_takes_along_those_that_have_bytes_in_it_and_no_others() -> None:
    slabs = Slabs(5)
    slabs.hold(EXPERTS[:7])
    slabs.keep(*EXPERTS[:7])
    slabs.give_back(1)  # bytes 100 to 199: cells 1 and 2
    assert slabs.held == [EXPERTS[cell] for cell in (0, 3, 4, 5, 6)]
    assert (slabs.num_frames, slabs.num_cells, slabs.frames.num_free) == (4, 5, 4)
    slabs.grow()  # fills the gap
    assert (slabs.num_frames, slabs.num_cells) == (5, 7)
    slabs.hold(EXPERTS[:7])
    slabs.keep(*EXPERTS[1:3])
    assert slabs.held == EXPERTS[:7]


def test_whoever_is_still_wanted_stays_and_the_others_make_room() -> None:
    slabs = Slabs(3)
    slabs.hold(EXPERTS[:4])
    slabs.keep(*EXPERTS[:4])
    slabs.hold([(1, 5), (0, 3), (1, 4), (0, 1), (0, 0)])
    assert slabs.held == [(0, 1), (0, 3)], "of the four wanted most, those that were there"
    assert slabs.begin(0, 0) is None
    slabs.keep((1, 4), (1, 5))
    assert slabs.held == [(0, 1), (0, 3), (1, 4), (1, 5)]


def test_what_a_load_uses_can_not_go() -> None:
    slabs = Slabs(3)
    slabs.hold(EXPERTS[:4])
    slabs.begin(0, 1)  # bytes 70 to 139: places 0 and 1
    assert [slabs.may_go(place) for place in range(3)] == [False, False, True]
    assert slabs.num_used_frames == 2
    assert slabs.losses(np.ones(SHAPE)).tolist() == [np.inf, np.inf, 2]
    with pytest.raises(AssertionError, match="place 1 is empty or in use"):
        slabs.give_back(1)
    slabs.end(0, 1, is_there=False)
    assert slabs.may_go(1)


def test_what_is_lost_with_a_frame() -> None:
    """Filled or not: who has a cell is to have it."""
    slabs = Slabs(3)
    worth = np.zeros(SHAPE)
    worth[0, :4] = 1, 10, 100, 1000
    slabs.hold(EXPERTS[:4])
    assert slabs.losses(worth).tolist() == [11, 110, 1100]
    slabs.hold(EXPERTS[:3])
    assert slabs.losses(worth).tolist() == [11, 110, 100]
    slabs.give_back(0)
    assert slabs.losses(worth).tolist() == [np.inf, 100, 100]


def test_all_can_be_given_back() -> None:
    slabs = Slabs(4)
    slabs.hold(EXPERTS)
    slabs.keep(*EXPERTS[:3])
    slabs.give_all_back()
    assert (slabs.held, slabs.num_frames, slabs.num_cells) == ([], 0, 0)
    assert slabs.frames.num_free == 8
    assert slabs.violations() == []


def test_what_is_no_smaller_than_nothing_is_never_held() -> None:
    slabs = PackedSlabs(Frames(2), SHAPE, frame_bytes=100, cell_bytes=0)
    assert not slabs.can_hold
    assert slabs.begin(0, 0) is None
    assert slabs.violations() == []


class SlabMachine(RuleBasedStateMachine):
    """An arena of bytes: whoever is decoded finds what was kept, whoever has taken the frames meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.slabs = Slabs(num_frames=9)
        self.arena = np.zeros(900, np.uint8)
        self.under_way: dict[tuple[int, int], PackedCell | None] = {}
        self.others: list[int] = []  # frames that are KV now

    def bytes_of(self, cell: PackedCell) -> Any:
        return np.concatenate([self.arena[start:stop] for start, stop in cell.runs])

    @precondition(lambda self: self.slabs.frames.num_free)
    @rule()
    def grow(self) -> None:
        self.slabs.grow()

    @precondition(lambda self: self.slabs.frames.num_free)
    @rule()
    def take(self) -> None:
        frame = self.slabs.frames.take_for_kv()
        self.others.append(frame)
        self.arena[frame * 100 : (frame + 1) * 100] = 255

    @precondition(lambda self: self.others)
    @rule()
    def give(self) -> None:
        self.slabs.frames.give(self.others.pop(0))

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        losses = self.slabs.losses(np.ones(SHAPE))
        places = [place for place in range(len(losses)) if self.slabs.may_go(place)]
        assert places == np.flatnonzero(losses < np.inf).tolist()
        if places:
            self.slabs.give_back(data.draw(st.sampled_from(places)))

    @precondition(lambda self: not self.under_way)
    @rule(experts=st.lists(st.sampled_from(EXPERTS), unique=True))
    def hold(self, experts: list[tuple[int, int]]) -> None:
        before = set(self.slabs.held)
        self.slabs.hold(experts)
        assert set(self.slabs.held) == before & set(experts[: self.slabs.num_cells])

    @rule(expert=st.sampled_from(EXPERTS))
    def begin(self, expert: tuple[int, int]) -> None:
        if expert in self.under_way:
            return
        cell = self.under_way[expert] = self.slabs.begin(*expert)
        if cell is not None:
            assert len(self.bytes_of(cell)) == 70

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), is_there=st.booleans())
    def end(self, data: st.DataObject, is_there: bool) -> None:
        expert = data.draw(st.sampled_from([*self.under_way]))
        cell = self.under_way.pop(expert)
        number = 1 + EXPERTS.index(expert)
        if cell is not None and cell.is_filled:
            assert (self.bytes_of(cell) == number).all()
        elif cell is not None:  # even of a read that fails in the end
            for start, stop in cell.runs:
                self.arena[start:stop] = number
        self.slabs.end(*expert, is_there=is_there)

    @invariant()
    def laws_hold(self) -> None:
        assert self.slabs.violations() == []
        assert self.slabs.frames.violations() == []
        assert len(self.slabs.held) <= self.slabs.num_cells <= self.slabs.num_frames * 100 // 70


SlabMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestSlabs = SlabMachine.TestCase
