"""Scores to probabilities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglmoe.prediction.calibration import Calibration, bucket_of


def row(*scores: float) -> np.ndarray:
    return np.array(scores, np.float32)


def used(*experts: int) -> np.ndarray:
    return np.isin(np.arange(4), experts)


def note(calibration: Calibration, scores: np.ndarray, *steps: tuple[int, ...]) -> None:
    """The same scores in each step, and what it used: in one call."""
    rows = np.tile(scores, (len(steps), 1))
    calibration.note(rows, 1, np.stack([used(*experts) for experts in steps]))


def probability(calibration: Calibration, scores: np.ndarray, distance: int = 1) -> list[float]:
    """Of a layer so many ahead."""
    table = np.zeros((distance, len(scores)), np.float32)
    table[-1] = scores
    found: list[float] = calibration.probabilities(table, -1)[-1].tolist()
    return found


def test_distances_are_counted_together() -> None:
    distances = np.array([1, 2, 3, 4, 5, 8, 9, 47])
    assert bucket_of(distances).tolist() == [0, 1, 2, 2, 3, 3, 4, 4]


def test_scores_are_as_likely_as_such_scores_came_true() -> None:
    calibration = Calibration(half_life_layers=1e9)
    # Of those with 0.9 one half is used, of those with 0.2 a quarter, of those with 0 none.
    note(calibration, row(0.9, 0.9, 0.2, 0), *((0, 2), (0,), (1,), (1,)) * 250)
    found = probability(calibration, row(0.9, 0.9, 0.2, 0))
    assert found == pytest.approx([0.5, 0.5, 0.25, 0], abs=0.01)


def test_what_is_not_predicted_happens_too() -> None:
    calibration = Calibration(half_life_layers=1e9)
    note(calibration, row(0.9, 0, 0, 0), *((0, 1), (0, 2), (0, 3)) * 300)
    assert probability(calibration, row(0.9, 0, 0, 0)) == pytest.approx([1, *[1 / 3] * 3], abs=0.01)


@pytest.mark.parametrize("wrong", [0.05, 0.5, 1.0])
def test_always_wrong_is_near_zero_everywhere(wrong: float) -> None:
    """Also for the experts that it doesn't predict: they are always used, but that isn't its merit."""
    calibration = Calibration()
    note(calibration, row(wrong, wrong, 0, 0), *[(2, 3)] * 200)
    for scores in (row(wrong, wrong, 0, 0), row(0.3, 0.6, 0.9, 0.01)):
        assert max(probability(calibration, scores)) < 0.02


def test_nothing_is_believed_before_it_has_come_true() -> None:
    assert probability(Calibration(), row(1, 0.5, 0.01, 0)) == [0, 0, 0, 0]


def test_distances_have_their_own_shares() -> None:
    calibration = Calibration(half_life_layers=1e9)
    near, far = row(0.9, 0, 0, 0), row(0, 0.9, 0, 0)
    for experts in ((0,), (0, 1)) * 100:
        calibration.note(np.stack([near, far]), np.array([1, 6]), used(*experts))
    assert probability(calibration, near, 1)[0] == pytest.approx(1, abs=0.05)
    assert probability(calibration, near, 5)[0] == pytest.approx(0.5, abs=0.05)
    assert probability(calibration, near, 2)[0] == 0  # nothing is known of it


def test_habits_change() -> None:
    calibration = Calibration(half_life_layers=50)
    for _ in range(500):
        note(calibration, row(0.9, 0, 0, 0), (1,))
    assert probability(calibration, row(0.9, 0, 0, 0))[0] < 0.05
    for _ in range(50):
        note(calibration, row(0.9, 0, 0, 0), (0,))
    # All before counts as much as these.
    assert probability(calibration, row(0.9, 0, 0, 0))[0] == pytest.approx(0.5, abs=0.05)


def test_a_score_not_seen_before_is_like_the_others() -> None:
    calibration = Calibration(half_life_layers=1e9)
    note(calibration, row(0.9, 0.9, 0, 0), *((0,), (1,)) * 500)
    assert probability(calibration, row(0.5, 0, 0, 0))[0] == pytest.approx(0.5, abs=0.01)


def test_a_layer_without_scores_was_not_predicted() -> None:
    calibration = Calibration(half_life_layers=1e9)
    note(calibration, row(0.9, 0, 0, 0), *[(0,)] * 1000)
    note(calibration, row(0, 0, 0, 0), *[(1, 2, 3)] * 1000)
    assert probability(calibration, row(0.9, 0, 0, 0)) == pytest.approx([1, 0, 0, 0], abs=0.01)
    assert probability(calibration, row(0, 0, 0, 0)) == [0, 0, 0, 0]


def test_layers_that_have_run_are_zero_and_the_next_is_at_distance_one() -> None:
    calibration = Calibration(half_life_layers=1e9)
    note(calibration, row(0.9, 0, 0, 0), *[(0,)] * 1000)
    table = np.full((3, 4), 0.9, np.float32)
    assert (calibration.probabilities(table, 0)[:, 0] > 0.9).tolist() == [False, True, False]
    assert (calibration.probabilities(table, -1)[:, 0] > 0.9).tolist() == [True, False, False]
    assert not calibration.probabilities(table, 2).any()
    assert table.min() > 0.8  # untouched


@settings(deadline=None, max_examples=50, derandomize=True, database=None)
@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1))
def test_probabilities_are_probabilities(rows: list[list[float]]) -> None:
    calibration = Calibration(half_life_layers=2)
    table = np.array(rows, np.float32)
    for number in range(3):
        calibration.note(table, np.arange(1, len(rows) + 1), table > 0.3 * number)
    found = calibration.probabilities(table, -1)
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1
