"""Which frames a step without the host may work with: 2 or 3 layers of 4 experts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglmoe.memory.frame_sets import USED, lay_out, plan_quotas, plan_sizes, spread


def sizes(
    resident: list[int],
    quotas: list[int],
    misses: list[int],
    *,
    num_free: int = 0,
    least: int = 0,
    most: int = 4,
) -> list[int]:
    counts = (np.array(its) for its in (resident, quotas, misses))
    room = np.full(len(resident), most)
    return plan_sizes(*counts, num_free=num_free, least=least, most=room).tolist()


# ---------------------------------------------------------------------------------------------- quotas


def test_a_layer_should_have_as_many_frames_as_it_has_of_the_most_valuable() -> None:
    values = np.array([[9.0, 8, 7, 1], [6, 2, 3, 0]])
    assert plan_quotas(values, 3, 0).tolist() == [3, 0]
    assert plan_quotas(values, 5, 0).tolist() == [3, 2]
    assert plan_quotas(values, 8, 0).tolist() == [4, 4]
    assert plan_quotas(values, 99, 0).tolist() == [4, 4]


def test_whatever_its_experts_are_worth_a_layer_has_the_least() -> None:
    values = np.array([[9.0, 8, 7, 6], [1, 1, 1, 0]])
    assert plan_quotas(values, 5, 2).tolist() == [3, 2]
    assert plan_quotas(values, 4, 2).tolist() == [2, 2]
    assert plan_quotas(values, 8, 4).tolist() == [4, 4]
    with pytest.raises(AssertionError, match="3 frames are not 2 for each of 2 layers"):
        plan_quotas(values, 3, 2)


def test_equals_share_evenly() -> None:
    assert plan_quotas(np.zeros((3, 4)), 8, 1).tolist() == [3, 3, 2]
    # One that is worth more beside equals: what is left goes to both in turns.
    assert plan_quotas(np.array([[5.0, 1, 1, 1], [1, 1, 1, 1]]), 4, 0).tolist() == [3, 1]


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=4),
    st.integers(0, 4),
    st.integers(0, 20),
)
def test_quotas_are_what_sorting_gives(values: list[list[int]], least: int, more: int) -> None:
    num_frames = least * len(values) + more
    quotas = plan_quotas(np.array(values, float), num_frames, least).tolist()
    assert sum(quotas) == min(num_frames, 4 * len(values))
    by_rank = [sorted(row, reverse=True) for row in values]
    inside = [
        value for row, quota in zip(by_rank, quotas, strict=True) for value in row[least:quota]
    ]
    outside = [value for row, quota in zip(by_rank, quotas, strict=True) for value in row[quota:]]
    assert all(least <= quota <= 4 for quota in quotas)
    assert min(inside, default=5) >= max(outside, default=0)


# ----------------------------------------------------------------------------------------------- sizes


def test_free_frames_go_to_who_missed_and_lacks_then_to_who_lacks_then_to_all() -> None:
    resident, quotas, misses = [1, 1, 2], [3, 3, 2], [0, 1, 4]
    all_sizes = [sizes(resident, quotas, misses, num_free=num_free) for num_free in range(1, 9)]
    assert all_sizes == [
        [1, 2, 2],  # who missed, and has less than its quota
        [2, 2, 2],  # now any who has less
        [2, 3, 2],
        [3, 3, 2],  # all have their quotas
        [4, 3, 2],  # in turns
        [4, 4, 2],
        [4, 4, 3],
        [4, 4, 4],
    ]
    assert sizes(resident, quotas, misses, num_free=99) == [4, 4, 4]


def test_frames_move_from_layers_above_their_quota_only_for_misses_of_those_below() -> None:
    assert sizes([3, 4, 1], [2, 2, 4], [0, 0, 0]) == [3, 4, 1]
    assert sizes([3, 4, 1], [2, 2, 4], [5, 5, 1]) == [2, 4, 2]
    assert sizes([3, 4, 1], [2, 2, 4], [0, 0, 2]) == [2, 3, 3]
    assert sizes([3, 4, 1], [2, 2, 4], [0, 0, 9]) == [2, 2, 4]
    # What is free comes first.
    assert sizes([3, 4, 1], [2, 2, 4], [0, 0, 2], num_free=1) == [2, 4, 3]
    assert sizes([3, 4, 1], [2, 2, 4], [0, 0, 2], num_free=2) == [3, 4, 3]


def test_the_least_is_brought_together_whoever_missed() -> None:
    assert sizes([4, 4, 0], [3, 3, 2], [0, 0, 0], least=2) == [3, 3, 2]
    assert sizes([4, 3, 0], [3, 3, 2], [0, 0, 0], least=2, num_free=1) == [3, 3, 2]


def test_no_set_exceeds_its_share() -> None:
    assert sizes([0, 2, 1], [2, 2, 2], [0, 0, 0], num_free=5, most=2) == [2, 2, 2]


@given(st.data())
def test_sizes_keep_what_was_promised(data: st.DataObject) -> None:
    """Nobody below `least` or above `most`, no frame twice, none left that is of use, and whoever gives is above its quota."""
    num_layers, least = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    counts = st.lists(st.integers(0, 6), min_size=num_layers, max_size=num_layers).map(np.array)
    resident, misses = data.draw(counts), data.draw(counts)
    quotas = least + np.minimum(data.draw(counts), 6 - least)
    lacking = max(0, int(quotas.sum() - resident.sum()))
    num_free = lacking + data.draw(st.integers(0, 9))
    most = np.full(num_layers, 6)
    planned = plan_sizes(resident, quotas, misses, num_free=num_free, least=least, most=most)
    assert ((least <= planned) & (planned <= 6)).all()
    assert planned.sum() == min(resident.sum() + num_free, 6 * num_layers)
    gives = planned < resident
    assert (planned[gives] >= quotas[gives]).all()
    assert not gives.any() or (planned <= np.maximum(resident, quotas)).all()


def test_spreading_takes_turns() -> None:
    room = np.array([1, 0, 3, 2])
    given = [spread(amount, room).tolist() for amount in range(-1, 8)]
    assert given == [
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 0, 1, 0],
        [1, 0, 1, 1],
        [1, 0, 2, 1],
        [1, 0, 2, 2],
        [1, 0, 3, 2],
        [1, 0, 3, 2],
    ]


# ---------------------------------------------------------------------------------------------- layout


def test_a_set_has_its_residents_and_then_empty_places() -> None:
    table = np.array([[7, -1, -1, 3], [-1, 5, -1, -1]], np.int32)
    values = np.array([[0.5, 9, 9, 0.25], [9, 0, 9, 9]])
    sets = lay_out(table, values, np.array([2, 3]), np.array([8, 2], np.int32))
    assert sets.sizes.tolist() == [2, 3]
    assert sets.frames.tolist() == [[7, 3, -1, -1], [5, 8, 2, -1]]
    assert sets.owners.tolist() == [[0, 3, -1, -1], [1, -1, -1, -1]]
    assert sets.keys.view(np.float32).tolist() == [[0.5, 0.25, 0, 0], [0, 0, 0, 0]]
    arrays = sets.sizes, sets.frames, sets.owners, sets.keys
    assert {its.dtype for its in arrays} == {np.dtype(np.int32)}


def test_keys_have_the_order_of_values_and_are_below_what_is_used() -> None:
    values = [0.0, 1e-45, 1e-20, 1.0, 1.5, 1e30, 1e300, np.inf]
    table = np.arange(8, dtype=np.int32)[np.newaxis]
    sets = lay_out(table, np.array([values]), np.array([8]), np.empty(0, np.int32))
    keys = sets.keys[0].tolist()
    assert keys[:6] == sorted(set(keys[:6]))
    assert keys[5] < keys[6] == keys[7] == USED - 1
