"""How many layers ahead to fetch for (Shen's ExpertFlow, 2.2: its adaptive step size S).

What the paper leaves open is decided here: how S is rounded and bounded, both thresholds, and how
feedback and formula go together. As long as no more is begun than the link has work for
(`prefetch.loads_to_begin`), the horizon decides little. FineMoE's map on three reference traces, a
quarter of the experts in frames (`eval.prefetch_replay --horizon 1,2,3,5,adaptive`): where the link
is busy, hits differ by 1 point at most between 1 layer and all 5; where it is idle, batches lose 3 to 6
points by looking 5 layers ahead instead of 1, and this keeps to 1.
"""

import math
from collections import deque
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.prediction.predictor import Scores

HISTORY_STEPS = 1024  # Arbitrary: so many are kept for a log.


class HorizonSettings(msgspec.Struct, frozen=True):
    """The thresholds."""

    late_limit: int = 8  # Arbitrary: so many late arrivals move the horizon one layer out,
    unused_limit: int = 8  # and so many unused ones one layer in


class HorizonRecord(msgspec.Struct, frozen=True):
    """The horizon of a step, and why."""

    formula: float  # layers, as computed
    correction: int  # layers, by late and unused arrivals
    layers: int  # the horizon


def expected_loads(probabilities: Scores, is_resident: npt.NDArray[np.bool_]) -> float:
    """N_e, as used here: how many absent experts a layer is expected to need, in the mean over layers.

    Of calibrated probabilities `[layers, num_experts]`. Counting residents too, their sum is off by 0.2 to
    1.1 experts a layer on the reference traces, where the paper's covering count is off by 7 to 17
    (`eval.expert_demand`): probabilities of a batch add up to what it uses, not to one.
    """
    return float((probabilities * ~is_resident).sum()) / len(probabilities)


def covering_experts(probabilities: Scores, coverage: float) -> float:
    """N_e, as in the paper (Shen 2.2): the fewest experts that have a share of `coverage` of a layer's probabilities.

    Of `[layers, num_experts]`; the mean over layers, 0 for layers that expect nothing.
    """
    shares = np.sort(probabilities, axis=1)[:, ::-1].cumsum(axis=1)
    totals = shares[:, -1:]
    # One is counted until the share is covered; rounding must not ask for one more.
    num_below = (shares < (coverage - 1e-6) * totals).sum(axis=1)
    return float(np.where(totals[:, 0] > 0, num_below + 1, 0).mean()) if len(shares) else 0.0


def layers_ahead(num_experts: float, *, expert_seconds: float, layer_seconds: float) -> float:
    """S = N_e E_s / (C_s T_l) (Shen 2.2): so many layers compute while a layer's experts arrive.

    `expert_seconds` is E_s / C_s, what the link takes for one; `layer_seconds` T_l, without stalls.
    """
    return num_experts * expert_seconds / layer_seconds


class Horizon:
    """The formula, rounded up, and moved by one layer whenever arrivals were late or unused too often.

    Whichever limit is reached first moves it, then both counts start again: so what is compared is
    how often either happens. The formula may move meanwhile; the correction stays on top of it.
    """

    def __init__(self, num_layers: int, settings: HorizonSettings | None = None):
        self.settings = settings or HorizonSettings()
        self.history: deque[HorizonRecord] = deque(maxlen=HISTORY_STEPS)
        self._most = max(1, num_layers - 1)
        self._formula = 1.0
        self._correction = 0
        self._late = self._unused = 0

    @property
    def layers(self) -> int:
        """From 1 to one less than there are."""
        return min(max(1, self._rounded() + self._correction), self._most)

    def update(self, num_experts: float, *, expert_seconds: float, layer_seconds: float) -> None:
        """At the beginning of a step: what a layer needs, and what was measured."""
        self._formula = layers_ahead(
            num_experts, expert_seconds=expert_seconds, layer_seconds=layer_seconds
        )
        self.history.append(HorizonRecord(self._formula, self._correction, self.layers))

    def note(self, *, late: int, unused: int) -> None:
        """So many experts were needed before they had arrived; so many arrived and were not used."""
        self._late += late
        self._unused += unused
        if self._late >= self.settings.late_limit:
            self._move(1)
        elif self._unused >= self.settings.unused_limit:
            self._move(-1)

    def _move(self, layers: int) -> None:
        self._late = self._unused = 0
        moved = min(max(1, self.layers + layers), self._most)
        self._correction = moved - self._rounded()

    def _rounded(self) -> int:
        """A layer's experts that take a little longer than a layer need two."""
        return min(max(1, math.ceil(self._formula - 1e-9)), self._most)


def token_distance(embeddings: npt.NDArray[Any]) -> float:
    """Dist(t) = sum over i < j of |v_i - v_j|^2 (Shen 2.2), of embeddings `[T, hidden]`.

    In one pass: T times the sum of all |v_i|^2 less |sum of all v_i|^2. How it enters the demand the
    paper does not say. On the reference traces its logarithm tells the demand as well as that of
    the number of tokens, and worse than that of distinct tokens or a forecast
    (`eval.expert_demand`): so nothing here depends on it.
    """
    vectors = embeddings.astype(np.float64)
    total = vectors.sum(axis=0)
    return max(0.0, float(len(vectors) * np.vdot(vectors, vectors) - total @ total))
