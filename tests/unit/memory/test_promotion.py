"""Which experts come into host memory: 2 layers of 4 experts, 4 blocks."""

from collections.abc import Mapping

import numpy as np
import pytest

from sglmoe.memory.promotion import Promotion, TierSnapshot, plan_promotions

Expert = tuple[int, int]


def snapshot(
    *,
    misses: Mapping[Expert, float] | None = None,
    heat: Mapping[Expert, float] | None = None,
    resident: tuple[Expert, ...] = (),
    here: tuple[Expert, ...] = (),
    busy: tuple[Expert, ...] = (),
    unreadable: tuple[Expert, ...] = (),
    num_free: int = 0,
) -> TierSnapshot:
    """`here` may leave, `busy` are here and may not."""

    def mask(experts: tuple[Expert, ...]) -> np.ndarray:
        found = np.zeros((2, 4), np.bool_)
        for expert in experts:
            found[expert] = True
        return found

    def numbers(values: Mapping[Expert, float] | None, dtype: type) -> np.ndarray:
        found = np.zeros((2, 4), dtype)
        for expert, value in (values or {}).items():
            found[expert] = value
        return found

    return TierSnapshot(
        misses=numbers(misses, np.float32),
        heat=numbers(heat, np.float64),
        is_resident=mask(resident),
        is_here=mask(here + busy),
        is_evictable=mask(here),
        is_unreadable=mask(unreadable),
        num_free=num_free,
    )


def test_before_any_request_free_blocks_fill_in_the_order_of_the_checkpoint() -> None:
    assert plan_promotions(snapshot(num_free=4), 3) == [
        Promotion(0, 0),
        Promotion(0, 1),
        Promotion(0, 2),
    ]


def test_free_blocks_go_to_hot_absent_experts_first_and_then_to_cold_residents() -> None:
    # (0, 0) and (0, 1) are in frames, where (0, 1) will be evicted first.
    heat = {(0, 0): 9.0, (0, 1): 5.0, (1, 2): 4.0, (0, 3): 3.0}
    state = snapshot(
        heat=heat, resident=((0, 0), (0, 1)), here=((0, 2), (1, 0), (1, 1), (1, 3)), num_free=4
    )
    assert plan_promotions(state, 9) == [
        Promotion(1, 2),
        Promotion(0, 3),
        Promotion(0, 1),
        Promotion(0, 0),
    ]


def test_what_the_frames_miss_most_comes_first_however_hot_others_are() -> None:
    state = snapshot(misses={(1, 3): 2, (0, 1): 1}, heat={(0, 0): 100.0}, num_free=3)
    assert plan_promotions(state, 3) == [Promotion(1, 3), Promotion(0, 1), Promotion(0, 0)]


def test_the_miss_that_made_an_expert_resident_does_not_count() -> None:
    # Both have been missed once. (0, 0) is in a frame since, (0, 1) has been evicted again.
    state = snapshot(misses={(0, 0): 1, (0, 1): 1}, resident=((0, 0),), num_free=1)
    assert plan_promotions(state, 8) == [Promotion(0, 1)]


def test_an_expert_that_comes_and_goes_is_wanted_although_it_is_resident_now() -> None:
    state = snapshot(misses={(0, 0): 5, (0, 1): 2}, resident=((0, 0),), num_free=1)
    assert plan_promotions(state, 8) == [Promotion(0, 0)]


def test_the_least_missed_gives_way_residents_that_stay_before_all_others() -> None:
    # Host memory is full. (0, 0) came into a frame with its one miss and has stayed there.
    here = ((0, 0), (0, 1), (0, 2), (0, 3))
    misses = {(0, 0): 1, (0, 1): 2, (0, 3): 5, (1, 0): 3, (1, 1): 2}
    state = snapshot(misses=misses, resident=((0, 0),), here=here)
    assert plan_promotions(state, 8) == [
        Promotion(1, 0, victim=(0, 0)),
        Promotion(1, 1, victim=(0, 2)),
    ]


@pytest.mark.parametrize(("misses", "gives_way"), [(2, False), (3, False), (4, True)])
def test_nearly_as_often_missed_is_not_worth_a_read(misses: int, gives_way: bool) -> None:
    # 1.5 times as often as the 2 misses of those who are here, and once more: 4.
    here = ((0, 0), (0, 1), (0, 2), (0, 3))
    state = snapshot(misses={(1, 2): misses} | dict.fromkeys(here, 2.0), here=here)
    assert bool(plan_promotions(state, 8)) is gives_way


def test_a_miss_that_has_half_faded_is_not_worth_a_read() -> None:
    # Nor where the victim's own, which made it resident, has faded further.
    state = snapshot(
        misses={(0, 0): 0.25, (1, 2): 0.5}, resident=((0, 0),), here=((0, 0), (0, 1), (0, 2))
    )
    assert plan_promotions(state, 8) == []


def test_equals_do_not_take_turns() -> None:
    """More experts than blocks, used in a circle: whoever is here stays and serves its share."""
    here = ((0, 0), (0, 1), (0, 2), (0, 3))
    everyone = dict.fromkeys(((layer, expert) for layer in range(2) for expert in range(4)), 7.0)
    heat = {(1, expert): 100.0 for expert in range(4)}
    assert plan_promotions(snapshot(misses=everyone, heat=heat, here=here), 8) == []


def test_pinned_and_unreadable_experts_are_left_alone() -> None:
    state = snapshot(
        misses={(1, 0): 9, (1, 1): 8},
        here=((0, 3),),
        busy=((0, 0), (0, 1), (0, 2)),
        unreadable=((1, 0),),
    )
    assert plan_promotions(state, 8) == [Promotion(1, 1, victim=(0, 3))]
