"""Measures of predictions, with numbers. 2 layers of 4 experts."""

import numpy as np
import pytest

from sglmoe.prediction.quality import Quality, QualityCounter, at_least, likeliest


def mask(*experts: int) -> np.ndarray:
    return np.isin(np.arange(4), experts)


def note(
    counter: QualityCounter,
    layer: int,
    predicted: np.ndarray,
    used: np.ndarray,
    *,
    distance: int = 1,
    absent: np.ndarray | None = None,
    probabilities: np.ndarray | None = None,
) -> None:
    if probabilities is None:
        probabilities = predicted.astype(np.float32)
    counter.note(
        layer,
        distance,
        probabilities=probabilities,
        predicted=predicted,
        used=used,
        absent=absent,
    )


def test_the_likeliest_are_so_many_at_most() -> None:
    scores = np.array([0.1, 0.4, 0, 0.3], np.float32)
    assert likeliest(scores, 2).tolist() == mask(1, 3).tolist()
    assert likeliest(scores, 4).tolist() == mask(0, 1, 3).tolist()  # 0 is no prediction
    assert at_least(scores, 0.3).tolist() == mask(1, 3).tolist()


def test_precision_and_recall() -> None:
    counter = QualityCounter(2)
    note(counter, 0, mask(0, 1, 2), mask(0, 3))  # one of three, one of two
    note(counter, 1, mask(1), mask(1))
    assert counter.quality().precision == 2 / 4
    assert counter.quality().recall == 2 / 3


def test_batch_accuracy_is_the_mean_over_layers() -> None:
    """He et al., 3.2. Two tokens use {0, 1} and {1, 2} in the first layer, {3} and {3} in the second; for
    them {0, 3}, {1} and {0}, {3} are predicted. |true AND pred| / |true| is 2 / 3 and 1 / 1."""
    true = [mask(0, 1) | mask(1, 2), mask(3) | mask(3)]
    predicted = [mask(0, 3) | mask(1), mask(0) | mask(3)]
    counter = QualityCounter(2)
    for layer in (0, 1):
        note(counter, layer, predicted[layer], true[layer])
    assert counter.quality().batch_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert counter.quality().recall == 3 / 4  # each expert counts the same


def test_coverage_is_of_the_absent_that_were_needed() -> None:
    counter = QualityCounter(2)
    note(counter, 0, mask(0, 1), mask(0, 1, 2), absent=mask(1, 2, 3))
    assert counter.quality().coverage == 1 / 2
    note(counter, 0, mask(0, 1), mask(0, 1))  # nobody knows what was absent
    assert counter.quality().coverage == 1 / 2


def test_calibration_error_is_the_distance_of_probability_and_truth() -> None:
    counter = QualityCounter(2)
    # Two with 0.75, one of which is used; two with 0.125, none is.
    probabilities = np.array([0.75, 0.75, 0.125, 0.125], np.float32)
    note(counter, 0, mask(0, 1), mask(0), probabilities=probabilities)
    assert counter.quality().calibration_error == pytest.approx((2 * 0.25 + 2 * 0.125) / 4)
    # Over many predictions errors of one kind and of the other cancel out.
    note(counter, 0, mask(0, 1), mask(0, 1), probabilities=probabilities)
    assert counter.quality().calibration_error == pytest.approx((4 * 0 + 4 * 0.125) / 8)


def test_layers_and_distances_are_told_apart() -> None:
    counter = QualityCounter(2)
    note(counter, 1, mask(0), mask(0), distance=1)
    note(counter, 1, mask(1), mask(0), distance=2)
    note(counter, 0, mask(0), mask(0, 1), distance=1)
    assert counter.quality(distance=1).recall == 2 / 3
    assert counter.quality(distance=2).recall == 0
    assert counter.quality(layer=0).recall == 1 / 2
    assert counter.quality(layer=1, distance=1).recall == 1
    assert counter.quality(layer=1).num_predictions == 2


def test_nothing_is_measured_by_nothing() -> None:
    counter = QualityCounter(2)
    nothing = Quality(0, None, None, None, None, None)
    assert counter.quality() == nothing
    note(counter, 0, mask(0), mask(0))
    assert counter.quality(layer=1) == nothing
    counter.clear()
    assert counter.quality() == nothing
