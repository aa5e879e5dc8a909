"""How many layers ahead: worked examples, as the paper has none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sglmoe.prediction.horizon import (
    Horizon,
    HorizonRecord,
    HorizonSettings,
    covering_experts,
    expected_loads,
    layers_ahead,
    token_distance,
)


def test_demand_is_the_fewest_experts_that_cover_the_share() -> None:
    rows = np.array([[0.5, 0.3, 0.1, 0.1], [0.1, 0.9, 0.0, 0.0]], np.float32)
    # 0.5 + 0.3 + 0.1 = 0.9 takes three, 0.9 one: 2 in the mean.
    assert covering_experts(rows, 0.9) == 2
    assert covering_experts(rows, 0.95) == 3  # four and two
    assert covering_experts(rows, 0.5) == 1


def test_demand_counts_shares_where_probabilities_do_not_add_up_to_one() -> None:
    """A batch uses more than one expert a layer."""
    assert covering_experts(np.full((1, 4), 0.75, np.float32), 0.75) == 3
    assert covering_experts(np.full((1, 4), 0.01, np.float32), 0.75) == 3


def test_layers_that_expect_nothing_have_no_demand() -> None:
    assert covering_experts(np.array([[1.0, 0.0], [0.0, 0.0]], np.float32), 0.9) == 0.5
    assert covering_experts(np.empty((0, 4), np.float32), 0.9) == 0


def test_loads_are_expected_for_absent_experts_alone() -> None:
    rows = np.array([[0.5, 0.25, 1.0, 0.0], [0.25, 0.0, 0.0, 1.0]], np.float32)
    is_resident = np.array([[False, False, True, True], [False, True, True, True]])
    assert expected_loads(rows, is_resident) == 0.5  # 0.75 and 0.25


def test_the_formula() -> None:
    # 8 experts of 2 ms each take as long as 4 layers of 4 ms.
    assert layers_ahead(8, expert_seconds=2e-3, layer_seconds=4e-3) == 4


def horizon_at(
    formula: float, *, num_layers: int = 8, late_limit: int = 3, unused_limit: int = 3
) -> Horizon:
    settings = HorizonSettings(late_limit=late_limit, unused_limit=unused_limit)
    horizon = Horizon(num_layers, settings)
    horizon.update(formula, expert_seconds=1.0, layer_seconds=1.0)
    return horizon


def test_the_horizon_is_rounded_up_within_one_and_all_other_layers() -> None:
    found = {formula: horizon_at(formula).layers for formula in (0.0, 0.2, 1.0, 1.01, 3.0, 6.5, 99)}
    assert found == {0.0: 1, 0.2: 1, 1.0: 1, 1.01: 2, 3.0: 3, 6.5: 7, 99: 7}
    assert Horizon(1).layers == 1  # a model of one layer


def test_late_arrivals_push_the_horizon_out_and_unused_ones_pull_it_in() -> None:
    horizon = horizon_at(2.0)
    horizon.note(late=2, unused=0)
    assert horizon.layers == 2
    horizon.note(late=1, unused=2)  # the third that was late; both counts begin again
    assert horizon.layers == 3
    horizon.note(late=0, unused=2)
    assert horizon.layers == 3
    horizon.note(late=0, unused=1)
    assert horizon.layers == 2
    horizon.note(late=0, unused=30)  # one layer at a time
    assert horizon.layers == 1


def test_the_correction_stays_on_top_of_the_formula() -> None:
    horizon = horizon_at(2.0)
    horizon.note(late=3, unused=0)
    horizon.update(4.0, expert_seconds=1.0, layer_seconds=1.0)
    assert horizon.layers == 5


def test_at_a_bound_nothing_piles_up() -> None:
    horizon = horizon_at(1.0)
    for _ in range(10):
        horizon.note(late=0, unused=3)
    horizon.note(late=3, unused=0)
    assert horizon.layers == 2  # at once
    for _ in range(10):
        horizon.note(late=3, unused=0)
    assert horizon.layers == 7
    horizon.note(late=0, unused=3)
    assert horizon.layers == 6


def test_a_correction_beyond_the_bounds_of_a_new_formula_counts_from_the_bound() -> None:
    horizon = horizon_at(5.0)
    for _ in range(3):
        horizon.note(late=0, unused=3)
    assert horizon.layers == 2
    horizon.update(1.0, expert_seconds=1.0, layer_seconds=1.0)  # 1 - 3 layers
    assert horizon.layers == 1
    horizon.note(late=3, unused=0)
    assert horizon.layers == 2


def test_each_update_is_on_record() -> None:
    horizon = horizon_at(2.5)
    horizon.note(late=3, unused=0)
    horizon.update(1.0, expert_seconds=2.0, layer_seconds=1.0)
    assert [*horizon.history] == [HorizonRecord(2.5, 0, 3), HorizonRecord(2.0, 1, 3)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 9), st.integers(0, 9))))
def test_the_horizon_stays_within_the_model(changes: list[tuple[float, int, int]]) -> None:
    horizon = Horizon(6)
    for formula, late, unused in changes:
        horizon.update(formula, expert_seconds=1.0, layer_seconds=1.0)
        before = horizon.layers
        horizon.note(late=late, unused=unused)
        assert 1 <= horizon.layers <= 5
        assert abs(horizon.layers - before) <= 1


def test_distance_of_three_tokens() -> None:
    # On a line at 0, 3 and 4: 9 + 16 + 1.
    assert token_distance(np.array([[0.0], [3.0], [4.0]])) == 26
    assert token_distance(np.ones((5, 3))) == 0
    assert token_distance(np.empty((0, 3))) == 0


@settings(deadline=None)
@given(arrays(np.float32, (5, 3), elements=st.floats(-100, 100, width=32)))
def test_distance_is_the_sum_over_all_pairs(embeddings: np.ndarray) -> None:
    vectors = embeddings.astype(np.float64)
    pairs = sum(
        float(((vectors[i] - vectors[j]) ** 2).sum()) for i in range(5) for j in range(i + 1, 5)
    )
    assert token_distance(embeddings) == pytest.approx(pairs, rel=1e-9, abs=1e-6)
