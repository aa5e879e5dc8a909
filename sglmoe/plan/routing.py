"""How unevenly experts are used: what a plan has to assume of a model that has not run.

Of a layer's experts, ordered by use, each is used by a token so much less often than the one before that
the last is used exp(-skew) times as often as the first; at most always, and top_k in all. In decode steps of
more requests the skew is smaller, because each request has experts of its own; so there is one for each
number of requests. (Zipf's law fits the traces below worse: hit ratios off by 0.066, not 0.038, at one
request, and by 0.024, not 0.013, at seven; its tail is too heavy.)
"""

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sglmoe.memory.residency import ExpertUses

# By the mean number of requests in a step: fitted by `python -m eval.routing_skew` to the hits of decode steps
# in replays of the reference traces, which are the demo model's, by the cost-aware policy; in this order those
# of one request (arithmetic-1, prose-1, python-1, recall-1), turns-4, mixed-8 and mixed-32.
REFERENCE_SKEW = {1.0: 3.0, 3.7: 1.85, 6.7: 1.1, 18.1: 0.55}


def reference_skew(num_running: float) -> float:
    """That of the reference traces: straight lines over the logarithm of the number, level beyond both ends."""
    points = sorted(REFERENCE_SKEW.items())
    if num_running <= points[0][0]:
        return points[0][1]
    for (low, low_skew), (high, high_skew) in pairwise(points):
        if num_running <= high:
            share = math.log(num_running / low) / math.log(high / low)
            return low_skew + share * (high_skew - low_skew)
    return points[-1][1]


def expert_uses(num_layers: int, num_experts: int, top_k: int, skew: float) -> ExpertUses:
    """What a step of one request uses, the same in every layer."""
    law = np.exp(-skew * np.arange(num_experts) / max(1, num_experts - 1))
    return ExpertUses(np.tile(scaled_to(law, top_k), (num_layers, 1)), num_running=1.0)


def scaled_to(weights: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.float64]:
    """Probabilities in proportion to descending `weights`, `total` in all; what would exceed 1 is 1.

    `total` is at most the number of weights.
    """
    probability: npt.NDArray[np.float64] = np.ones_like(weights)
    for num_certain in range(total):
        rest = weights[num_certain:]
        scaled = rest * ((total - num_certain) / rest.sum())
        if scaled[0] <= 1:
            probability[num_certain:] = scaled
            return probability
    probability[total:] = 0.0
    return probability
