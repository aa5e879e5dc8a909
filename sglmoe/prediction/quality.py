"""How good predictions are, by layer and by how many layers ahead they were made."""

from enum import IntEnum

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.prediction.predictor import Scores

Mask = npt.NDArray[np.bool_]  # [num_experts], of one layer in one step

NUM_BINS = 10  # of probabilities, for the calibration error


def at_least(probabilities: Scores, threshold: float) -> Mask:
    """The predicted set: experts that are likely enough."""
    return probabilities >= threshold


def likeliest(scores: Scores, num_experts: int) -> Mask:
    """The predicted set: so many, fewer where the others have a score of 0."""
    chosen = np.zeros(len(scores), bool)
    chosen[np.argsort(-scores, kind="stable")[:num_experts]] = True
    return chosen & (scores > 0)


class Quality(msgspec.Struct, frozen=True):
    """Of predictions of single layers, one for each step and distance. None: nothing to measure it by."""

    num_predictions: int
    precision: float | None  # of the experts predicted, those that were used
    recall: float | None  # of the experts used, those that were predicted
    batch_accuracy: float | None  # He et al., 3.2: mean of each prediction's recall
    coverage: float | None  # of the experts used that were absent, those that were predicted
    calibration_error: float | None  # expected: mean distance of probability and share used


class _Sum(IntEnum):
    PREDICTIONS = 0
    PREDICTED = 1
    USED = 2
    BOTH = 3
    ABSENT = 4  # and used
    ABSENT_BOTH = 5
    RECALLS = 6
    RECALLED = 7  # predictions of layers that used any expert


class QualityCounter:
    """Adds up predictions and what became of them."""

    def __init__(self, num_layers: int):
        # By layer and distance - 1.
        self._sums: npt.NDArray[np.float64] = np.zeros((num_layers, num_layers, len(_Sum)))
        # The same by bin of probabilities: experts, their summed probability, those used.
        self._bins: npt.NDArray[np.float64] = np.zeros((num_layers, num_layers, 3, NUM_BINS))

    def note(
        self,
        layer: int,
        distance: int,
        *,
        probabilities: Scores,
        predicted: Mask,
        used: Mask,
        absent: Mask | None = None,
    ) -> None:
        """A layer's experts as predicted `distance` layers ahead, and those its step then used.

        `probabilities`: float32 [num_experts]. `absent`: experts in no frame when their layer began.
        """
        both = predicted & used
        needed = used & absent if absent is not None else np.zeros_like(used)
        num_used, num_both = int(used.sum()), int(both.sum())
        self._sums[layer, distance - 1] += (
            1,
            int(predicted.sum()),
            num_used,
            num_both,
            int(needed.sum()),
            int((needed & both).sum()),
            num_both / max(num_used, 1),
            num_used > 0,
        )
        bins = np.minimum((probabilities * NUM_BINS).astype(np.intp), NUM_BINS - 1)
        self._bins[layer, distance - 1] += (
            np.bincount(bins, minlength=NUM_BINS),
            np.bincount(bins, probabilities, NUM_BINS),
            np.bincount(bins, used, NUM_BINS),
        )

    def quality(self, *, layer: int | None = None, distance: int | None = None) -> Quality:
        """Of one layer or all, predicted from one distance or any."""
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        distances = slice(None) if distance is None else slice(distance - 1, distance)
        sums = self._sums[layers, distances].sum((0, 1)).tolist()
        experts, probability, used = self._bins[layers, distances].sum((0, 1))
        return Quality(
            num_predictions=int(sums[_Sum.PREDICTIONS]),
            precision=_ratio(sums[_Sum.BOTH], sums[_Sum.PREDICTED]),
            recall=_ratio(sums[_Sum.BOTH], sums[_Sum.USED]),
            batch_accuracy=_ratio(sums[_Sum.RECALLS], sums[_Sum.RECALLED]),
            coverage=_ratio(sums[_Sum.ABSENT_BOTH], sums[_Sum.ABSENT]),
            calibration_error=_ratio(float(np.abs(probability - used).sum()), float(experts.sum())),
        )

    def clear(self) -> None:
        self._sums[:] = 0
        self._bins[:] = 0


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
