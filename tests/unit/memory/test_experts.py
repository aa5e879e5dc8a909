"""The table of resident experts: 2 layers of 4, 3 frames."""

import numpy as np
import pytest

from sglmoe.memory.arena import Frames
from sglmoe.memory.experts import ExpertTable, Load


@pytest.fixture
def frames() -> Frames:
    return Frames(3)


@pytest.fixture
def table(frames: Frames) -> ExpertTable:
    return ExpertTable(2, 4, frames=frames)


def place(table: ExpertTable, frames: Frames, layer: int, expert: int) -> None:
    table.place(Load(frames.take_for_expert(layer, expert), layer, expert))


def test_pinned_is_not_evictable_until_it_is_unpinned(table: ExpertTable, frames: Frames) -> None:
    place(table, frames, 1, 2)
    place(table, frames, 0, 2)
    assert table.frame_table.tolist() == [[-1, -1, 1, -1], [-1, -1, 0, -1]]
    assert table.frame_table.dtype == np.int32
    table.pin(1, np.array([2]))
    assert np.argwhere(table.evictable()).tolist() == [[0, 2]]
    assert [table.is_evictable(layer, 2) for layer in (0, 1)] == [True, False]
    assert not table.is_evictable(0, 0)  # absent
    table.unpin()
    assert np.argwhere(table.evictable()).tolist() == [[0, 2], [1, 2]]
    assert table.violations() == []


def test_evicted_gives_its_frame_back_and_the_table_stays_in_place(
    table: ExpertTable, frames: Frames
) -> None:
    address = table.frame_table.ctypes.data
    place(table, frames, 0, 3)
    assert table.num_resident == [1, 0]
    table.evict(0, 3)
    assert table.num_resident == [0, 0]
    assert frames.num_free == 3
    assert table.frame_table[0, 3] == -1
    assert table.frame_table.ctypes.data == address
    assert table.violations() == []


def test_a_pinned_expert_can_not_be_evicted(table: ExpertTable, frames: Frames) -> None:
    place(table, frames, 0, 0)
    table.pin(0, np.array([0]))
    with pytest.raises(AssertionError, match="layer 0 expert 0 can't be evicted"):
        table.evict(0, 0)


def test_newcomers_get_the_frames_of_whom_they_replace_or_free_ones(
    table: ExpertTable, frames: Frames
) -> None:
    place(table, frames, 0, 3)
    place(table, frames, 1, 3)
    table.is_unused[1, 3] = True
    layers, evicted, newcomers = np.array([[0, 1, 1], [3, 3, -1], [1, 0, 2]])
    table.replace(layers, evicted, newcomers, frames=np.array([0, 1, 2], np.int32))
    assert table.frame_table.tolist() == [[-1, 0, -1, -1], [1, -1, 2, -1]]
    assert (table.num_resident, table.num_unused_evicted) == ([1, 2], 1)
    assert table.violations() == []


def test_an_expert_may_move_to_the_frame_of_another(table: ExpertTable, frames: Frames) -> None:
    place(table, frames, 0, 0)
    place(table, frames, 0, 1)
    swapped = np.array([0, 0]), np.array([0, 1]), np.array([1, 0])
    table.replace(*swapped, frames=np.array([0, 1], np.int32))
    assert table.frame_table[0].tolist() == [1, 0, -1, -1]
    assert table.violations() == []
    with pytest.raises(AssertionError, match="a newcomer is a resident"):
        table.replace(*(np.array([its]) for its in (0, -1, 0)), frames=np.array([2], np.int32))


def test_violations_notice_a_frame_with_another_owner(table: ExpertTable, frames: Frames) -> None:
    table.place(Load(frames.take_for_expert(0, 1), 0, 0))
    assert table.violations() == [
        "experts that have a frame and owners of frames are not one to one"
    ]


def test_violations_notice_a_pin_on_what_is_not_there(table: ExpertTable) -> None:
    table.pin(1, np.array([3]))
    assert table.violations() == ["an absent expert is pinned"]
