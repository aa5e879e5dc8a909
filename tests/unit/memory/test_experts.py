"""The table of resident experts: 2 layers of 4, 3 frames."""

import numpy as np
import pytest

from sglmoe.memory.arena import Frames
from sglmoe.memory.eviction import EvictionOrder, Tenant
from sglmoe.memory.experts import ExpertTable


@pytest.fixture
def order() -> EvictionOrder:
    return EvictionOrder()


@pytest.fixture
def frames() -> Frames:
    return Frames(3)


@pytest.fixture
def table(frames: Frames, order: EvictionOrder) -> ExpertTable:
    return ExpertTable(2, 4, frames=frames, order=order)


def place(table: ExpertTable, frames: Frames, layer: int, expert: int) -> None:
    table.place(table.layer(layer)[expert], frames.take_for_expert(layer, expert))


def test_placed_is_pinned_until_it_is_unpinned(
    table: ExpertTable, frames: Frames, order: EvictionOrder
) -> None:
    place(table, frames, 1, 2)
    assert table.frame_table.tolist() == [[-1, -1, -1, -1], [-1, -1, 0, -1]]
    assert table.frame_table.dtype == np.int32
    assert table.num_pinned == 1
    assert order.pop(Tenant.EXPERT) is None
    table.unpin([table.layer(1)[2]])
    assert table.violations() == []
    assert order.pop(Tenant.EXPERT) is table.layer(1)[2]


def test_evicted_gives_its_frame_back_and_the_table_stays_in_place(
    table: ExpertTable, frames: Frames, order: EvictionOrder
) -> None:
    address = table.frame_table.ctypes.data
    place(table, frames, 0, 3)
    expert = table.layer(0)[3]
    table.unpin([expert])
    assert order.pop(Tenant.EXPERT) is expert
    table.evict(expert)
    assert frames.num_free == 3
    assert table.frame_table[0, 3] == -1
    assert table.frame_table.ctypes.data == address
    assert table.violations() == []


def test_a_pinned_expert_can_not_be_evicted(table: ExpertTable, frames: Frames) -> None:
    place(table, frames, 0, 0)
    with pytest.raises(AssertionError, match="layer 0 expert 0 can't be evicted"):
        table.evict(table.layer(0)[0])


def test_violations_notice_a_frame_with_another_owner(table: ExpertTable, frames: Frames) -> None:
    table.place(table.layer(0)[0], frames.take_for_expert(0, 1))
    assert table.violations() == ["resident experts and owners of frames are not one to one"]
