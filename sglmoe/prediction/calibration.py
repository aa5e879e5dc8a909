"""From scores of any predictor to probabilities: what became of such scores so far."""

import numpy as np
import numpy.typing as npt

from sglmoe.prediction.predictor import Scores

# Layers ahead that are counted together: 1, 2, 3-4, 5-8, 9 and more.
NUM_BUCKETS = 5
# Scores that are counted together have similar log-odds, so that 1 % and 2 % are told apart as well
# as 98 % and 99 %. Scores that fall together lose their order: as many experts as a layer uses, taken by
# probability, are right 2.0 points less often than by score with 24 bins, 1.0 with 48 or 96 (mean over
# eval/traces of single requests and mixed-8, 1 to 5 layers ahead, `PreviousLayer`).
NUM_BINS = 48
# Scores are rounded to multiples of 1 / STEPS before they are looked up.
STEPS = 4095
# Arbitrary: a score never seen before counts as so many that came true as often as the others of its bucket.
PRIOR_SCORES = 8.0
# Arbitrary: what a bucket has seen counts half after so many layers that were predicted at such a distance.
HALF_LIFE_LAYERS = 512


# Of distances of 0 layers (there is none), 1 and so on, as many as a model may have layers.
BUCKETS: npt.NDArray[np.intp] = (
    np.ceil(np.log2(np.arange(1024).clip(1))).clip(max=NUM_BUCKETS - 1).astype(np.intp)
)


def bucket_of(layer_distance: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """0 to 4, of distances of 1 layer and more."""
    buckets: npt.NDArray[np.intp] = BUCKETS[layer_distance]
    return buckets


def _bins_of_scores() -> npt.NDArray[np.intp]:
    """By score * STEPS. Bin 0 is of the score 0 alone."""
    inner = np.arange(1, STEPS) / STEPS
    log_odds = np.log(inner / (1 - inner))
    edges = np.linspace(log_odds[0], log_odds[-1], NUM_BINS)[1:-1]
    return np.concatenate(([0], 1 + np.searchsorted(edges, log_odds), [NUM_BINS - 1]))


BIN_OF_SCORE = _bins_of_scores()


class Calibration:
    """Shares of scores that came true, by score and distance; recent ones count more.

    An expert with a score of 0 is as likely as such experts were, but never likelier than those with
    higher scores were on average: so a predictor that is always wrong has probabilities near 0
    everywhere, and so has one of which nothing has been noted. A layer where all scores are 0 was
    not predicted: it is not counted and stays 0.
    """

    def __init__(self, *, half_life_layers: float = HALF_LIFE_LAYERS) -> None:
        self._half_life_layers = half_life_layers
        shape = (NUM_BUCKETS, NUM_BINS)
        self._predicted: npt.NDArray[np.float64] = np.zeros(shape)  # experts, with decay
        self._used: npt.NDArray[np.float64] = np.zeros(shape)  # those of them that were used
        self._rates: npt.NDArray[np.float32] | None = None  # [buckets, bins]

    def note(
        self,
        raw_scores: Scores,
        layer_distance: int | npt.NDArray[np.intp],
        used_mask: npt.NDArray[np.bool_],
    ) -> None:
        """One or more predictions of a layer, and what it did then use.

        `raw_scores`: float32 [num_experts] or [n, num_experts], 0 to 1. `layer_distance`: how many layers
        ahead each was made, 1 for the next one. `used_mask`: bool, of the same shape or [num_experts].
        """
        scores = np.atleast_2d(raw_scores)
        buckets = bucket_of(np.broadcast_to(np.asarray(layer_distance), len(scores)))
        used = np.broadcast_to(used_mask, scores.shape)
        is_predicted = scores.any(1)
        if not is_predicted.all():
            scores, buckets, used = scores[is_predicted], buckets[is_predicted], used[is_predicted]
        cells = _cells(scores, buckets)
        weight = 0.5 ** (np.bincount(buckets, minlength=NUM_BUCKETS) / self._half_life_layers)
        for counts, noted in (
            (self._predicted, cells.ravel()),
            (self._used, cells[used]),
        ):
            counts *= weight[:, np.newaxis]
            counts += np.bincount(noted, minlength=counts.size).reshape(counts.shape)
        self._rates = None

    def probabilities(self, scores: Scores, layer: int) -> Scores:
        """Of the layers after `layer`, the last one observed (-1: none); 0 for the others."""
        if self._rates is None:
            self._rates = self._new_rates()
        ahead = scores[layer + 1 :]
        buckets = BUCKETS[1 : len(ahead) + 1]
        result = np.zeros(scores.shape, np.float32)
        result[layer + 1 :] = self._rates.ravel()[_cells(ahead, buckets)]
        result[layer + 1 :] *= ahead.any(1, keepdims=True)
        return result

    def _new_rates(self) -> npt.NDArray[np.float32]:
        num_predicted = self._predicted[:, 1:].sum(1, keepdims=True)
        prior = self._used[:, 1:].sum(1, keepdims=True) / (num_predicted + PRIOR_SCORES)
        rates: npt.NDArray[np.float32] = np.divide(
            self._used + PRIOR_SCORES * prior, self._predicted + PRIOR_SCORES
        ).astype(np.float32)
        rates[:, :1] = np.minimum(rates[:, :1], prior)
        return rates


def _cells(scores: Scores, buckets: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Indices into [buckets, bins], flat, of scores [n, num_experts]."""
    steps = (scores * np.float32(STEPS) + np.float32(0.5)).astype(np.intp)
    cells: npt.NDArray[np.intp] = BIN_OF_SCORE[steps]
    cells += buckets[:, np.newaxis] * NUM_BINS
    return cells
