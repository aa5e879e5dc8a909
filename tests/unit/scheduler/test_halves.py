"""Who decodes together: a model of 2 layers with 4 experts each, and requests that take two of them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglmoe.scheduler.halves import (
    Halves,
    PassCosts,
    RecentUses,
    Turns,
    assign,
    distances,
    expected_misses,
    medoid,
    misses_in_turn,
    num_activated,
    pack,
    plan_affinity,
    split,
)

NUM_LAYERS, NUM_EXPERTS = 2, 4
# By request: its experts in the first layer, and in the second. Even ones keep to the low numbers.
FOUR = [([0, 1], [0, 1]), ([2, 3], [2, 3]), ([0, 1], [0, 2]), ([2, 3], [2, 3])]


def used_by(requests: Sequence[tuple[list[int], list[int]]]) -> npt.NDArray[np.bool_]:
    used = np.zeros((len(requests), NUM_LAYERS, NUM_EXPERTS), np.bool_)
    for request, layers in enumerate(requests):
        for layer, experts in enumerate(layers):
            used[request, layer, experts] = True
    return used


def as_lists(halves: Halves) -> list[list[int]]:
    return [half.tolist() for half in halves]


class TestSplit:
    def test_distance_is_what_one_takes_and_the_other_does_not(self) -> None:
        """The third differs from the first in experts 1 and 2 of the second layer."""
        apart = distances(pack(used_by(FOUR)))
        assert apart.tolist() == [[0, 8, 2, 8], [8, 0, 6, 0], [2, 6, 0, 6], [8, 0, 6, 0]]

    def test_objective_counts_what_a_half_takes_once(self) -> None:
        packed = pack(used_by(FOUR))
        assert num_activated(packed, np.arange(4)) == 8
        assert num_activated(packed, np.array([0, 2])) == 5
        assert num_activated(packed, np.array([1, 3])) == 4

    def test_those_that_are_alike_come_together(self) -> None:
        assert as_lists(split(pack(used_by(FOUR)))) == [[0, 2], [1, 3]]

    def test_halves_are_equal_though_most_are_alike(self) -> None:
        """Three like the first one and one like the second: the third, which is least like the first, has to go."""
        like_first = [FOUR[0], FOUR[1], FOUR[2], FOUR[0]]
        assert as_lists(split(pack(used_by(like_first)))) == [[0, 3], [1, 2]]

    def test_medoids_move_until_nothing_gets_closer(self) -> None:
        """The first and the last differ most, and would draw one each of two that are the same."""
        packed = pack(used_by([([1], [3]), ([0, 1], []), ([0, 1], []), ([0, 2], [3])]))
        assert as_lists(assign(distances(packed), 0, 3)) == [[0, 1], [2, 3]]
        assert as_lists(split(packed)) == [[0, 3], [1, 2]]

    def test_a_medoid_is_the_nearest_to_all_others(self) -> None:
        """Experts on a line: request 2 is in the middle of 0 to 4, and 1 of 0, 1 and 3."""
        apart = distances(pack(np.tril(np.ones((5, 5), np.bool_), -1)))
        assert medoid(apart, np.arange(5)) == 2
        assert medoid(apart, np.array([0, 1, 3])) == 1

    def test_all_alike_are_split_anyhow(self) -> None:
        assert as_lists(split(pack(used_by([FOUR[0]] * 3)))) == [[0, 1], [2]]

    def test_one_can_not_be_split(self) -> None:
        with pytest.raises(ValueError, match="1 request"):
            split(pack(used_by(FOUR[:1])))

    @given(st.integers(2, 9), st.integers(1, 80), st.randoms(use_true_random=False))
    def test_halves_are_balanced_cover_all_and_are_the_same_again(
        self, num_requests: int, num_experts: int, rng: object
    ) -> None:
        seed = rng.randrange(1 << 30)  # type: ignore[attr-defined]
        used = np.random.default_rng(seed).random((num_requests, 1, num_experts)) < 0.3
        first, second = split(pack(used))
        assert len(second) <= len(first) <= len(second) + 1
        assert sorted([*first.tolist(), *second.tolist()]) == list(range(num_requests))
        assert as_lists(split(pack(used))) == [first.tolist(), second.tolist()]
        objective = num_activated(pack(used), first) + num_activated(pack(used), second)
        assert objective == used[first].any(axis=0).sum() + used[second].any(axis=0).sum()


# ---------------------------------------------------------------------------------------------------- does it pay?

DEAR = PassCosts(fixed_seconds=1.0, row_seconds=0.0, load_seconds=10.0)
CHEAP = PassCosts(fixed_seconds=1.0, row_seconds=0.0, load_seconds=0.1)


def always(requests: Sequence[tuple[list[int], list[int]]]) -> RecentUses:
    """They took these in each of eight steps."""
    return RecentUses((8 * used_by(requests)).astype(np.uint8), 8)


class TestPlan:
    """Four requests take all eight experts, their halves five and four."""

    def test_long_turns_pay_where_loads_are_dear(self) -> None:
        plan = plan_affinity(always(FOUR), expert_frames=5, costs=DEAR, turn_steps=100)
        assert plan.halves is not None
        assert as_lists(plan.halves) == [[0, 2], [1, 3]]
        assert (plan.num_together, plan.num_in_halves) == (8, 9)
        # Three of eight are absent, and each is used by one at least: 17 times of 18.
        assert plan.misses_together == pytest.approx(3, abs=0.1)
        # What a half needs is there. The three others are used once in ten steps of two.
        assert plan.misses_in_turn == pytest.approx(6 * (1 - (17 / 18) ** 2), abs=0.1)
        assert plan.gain_ratio == pytest.approx(
            (1 + 10 * plan.misses_together) / (2 + 10 * plan.misses_in_turn)
        )

    def test_not_where_another_pass_costs_more_than_it_saves(self) -> None:
        plan = plan_affinity(always(FOUR), expert_frames=5, costs=CHEAP, turn_steps=100)
        assert plan.halves is None
        assert plan.gain_ratio < 1

    def test_not_where_halves_take_turns_at_every_step(self) -> None:
        plan = plan_affinity(always(FOUR), expert_frames=5, costs=DEAR, turn_steps=1)
        assert plan.halves is None
        assert plan.misses_in_turn >= plan.misses_together

    def test_not_where_all_experts_fit(self) -> None:
        plan = plan_affinity(always(FOUR), expert_frames=8, costs=DEAR, turn_steps=100)
        assert (plan.halves, plan.num_in_halves, plan.gain_ratio) == (None, 8, 1.0)

    def test_not_for_a_lone_request(self) -> None:
        plan = plan_affinity(always(FOUR[:1]), expert_frames=2, costs=DEAR, turn_steps=100)
        assert plan.halves is None

    def test_where_loads_are_hidden_halves_pay_only_for_fewer_of_them(self) -> None:
        hidden = PassCosts(1.0, 0.0, 10.0, loads_overlap=True)
        plan = plan_affinity(always(FOUR), expert_frames=5, costs=hidden, turn_steps=100)
        assert plan.gain_ratio == pytest.approx(plan.misses_together / plan.misses_in_turn)


def test_what_halves_exchange_is_loaded_twice_a_round() -> None:
    """Each needs two experts of its own, and there are two frames: four loads in four steps of each."""
    halves = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], np.float32)
    assert misses_in_turn(*halves, frames=2, turn_steps=4) == 1.0
    assert misses_in_turn(*halves, frames=2, turn_steps=1) == 2.0, "two stay, and two come and go"


probabilities = st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6)


@given(probabilities, probabilities, st.integers(1, 7))
def test_turns_of_one_step_never_load_less_than_all_together(
    first: list[float], second: list[float], frames: int
) -> None:
    """Whatever the routing: a half's pass needs what it needs, and an expert of both halves is needed twice."""
    halves = np.array(first, np.float32), np.array(second, np.float32)
    together = 1 - (1 - halves[0]) * (1 - halves[1])
    assert misses_in_turn(*halves, frames, 1) >= expected_misses(together, frames) - 1e-5


# ---------------------------------------------------------------------------------------------------------- turns


class TestTurns:
    def test_halves_alternate(self) -> None:
        turns = Turns(2)
        turns.begin_round(["a", "c"], ["b", "d"])
        steps = [turns.next_step(["a", "b", "c", "d"]) for _ in range(4)]
        assert steps == [["a", "c"], ["a", "c"], ["b", "d"], ["b", "d"]]
        assert turns.round_is_over

    def test_who_comes_joins_the_smaller_half(self) -> None:
        turns = Turns(1)
        turns.begin_round(["a", "c"], ["b"])
        assert turns.next_step(["a", "b", "c", "new"]) == ["a", "c"]
        assert turns.next_step(["a", "b", "c", "new"]) == ["b", "new"]

    def test_a_half_that_has_ended_is_not_waited_for(self) -> None:
        turns = Turns(3)
        turns.begin_round(["a"], ["b"])
        assert turns.next_step(["a", "b"]) == ["a"]
        assert turns.next_step(["b"]) == ["b"]

    @given(st.data(), st.integers(1, 4))
    def test_nobody_waits_for_more_than_two_turns(self, data: st.DataObject, length: int) -> None:
        turns, running, waited = Turns(length), ["0"], {"0": 0}
        for number in range(1, 40):
            change = data.draw(st.sampled_from(["none", "none", "come", "go"]))
            if change == "come":
                running.append(str(number))
            elif change == "go" and running:
                running.remove(data.draw(st.sampled_from(running)))
            if turns.round_is_over:
                order = data.draw(st.permutations(running))
                middle = (len(order) + 1) // 2
                turns.begin_round(order[:middle], order[middle:])
            decoding = turns.next_step(running)
            assert decoding or not running
            assert decoding == [rid for rid in running if rid in decoding]
            waited = {rid: 0 if rid in decoding else waited.get(rid, 0) + 1 for rid in running}
            assert max(waited.values(), default=0) <= 2 * length
