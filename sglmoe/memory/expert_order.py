"""Which resident expert is the next to go."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sglmoe.memory.eviction import Clock
from sglmoe.memory.expert_values import ExpertValues, Probabilities, Values
from sglmoe.memory.experts import ExpertIds, ExpertTable

# Victims are picked so many at once: finding one takes as long as finding all of these.
NUM_CANDIDATES = 128
# What was worth no more than the last ones picked is looked at first. Whether that is so many or 1 makes no difference
# to who goes; of more, sorting them takes longer than finding the least.
MAX_CANDIDATES = 4 * NUM_CANDIDATES


class Candidate(NamedTuple):
    """A resident that was among the least valuable."""

    layer: int
    expert: int
    value: float


class ExpertOrder:
    """Residents by value, the least first; of equals the lowest layer and number.

    Values are looked at once a layer: what changes meanwhile are pins and residents alone.
    """

    def __init__(self, table: ExpertTable, values: ExpertValues, *, clock: Clock):
        self.values = values
        self._table = table
        self._clock = clock
        self._num_experts = table.frame_table.shape[1]
        self._now: Values | None = None
        self._candidates: list[tuple[int, float]] = []  # place in the table, value; the least last
        self._bound = -np.inf  # what the last of those that were found the least was worth

    def now(self) -> Values:
        """What each is worth, looked at once a layer. Not to be kept or changed."""
        if self._now is None:
            self._now = self.values.now()
        return self._now

    def begin_step(self) -> None:
        """The next uses are those of another forward pass."""
        self._look_anew()
        self.values.begin_step()

    def use(self, layer: int, experts: ExpertIds) -> None:
        """Note that these are used now."""
        self._look_anew()
        self._clock.tick()
        self.values.use(layer, experts)

    def expect(self, layer: int, probabilities: Probabilities) -> None:
        """See `ExpertValues.expect`."""
        self._look_anew()
        self.values.expect(layer, probabilities)

    def layer_done(self) -> None:
        """Its experts have no pins any more."""
        self._look_anew()

    def first(self) -> Candidate | None:
        """The evictable resident to go next; None if there is none."""
        while self._candidates or self._pick_candidates():
            place, value = self._candidates[-1]
            layer, expert = divmod(place, self._num_experts)
            if self._table.is_evictable(layer, expert):
                return Candidate(layer, expert, value)
            self._candidates.pop()
        return None

    def first_of(self, layer: int) -> Candidate | None:
        """The same within one layer."""
        return next(iter(self.first_few_of(layer, 1)), None)

    def first_few_of(self, layer: int, num_experts: int) -> list[Candidate]:
        """The evictable residents of a layer to go next, in their order."""
        experts = np.flatnonzero(self._table.evictable_of(layer))
        values = self.now()[layer, experts]
        order = values.argsort(kind="stable")[:num_experts]
        pairs = zip(experts[order].tolist(), values[order].tolist(), strict=True)
        return [Candidate(layer, *pair) for pair in pairs]

    def clear(self) -> None:
        """Forget all uses."""
        self._look_anew()
        self.values.clear()

    def _look_anew(self) -> None:
        self._now = None
        self._candidates.clear()

    def _pick_candidates(self) -> bool:
        """Find the least valuable; False if none is evictable."""
        values = np.where(self._table.evictable(), self.now(), np.inf).ravel()
        places = np.flatnonzero(values <= self._bound)
        if not 0 < len(places) <= MAX_CANDIDATES:
            places = self._least(values)
        order = places[values[places].argsort(kind="stable")[::-1]]
        self._candidates = [*zip(order.tolist(), values[order].tolist(), strict=True)]
        return bool(self._candidates)

    def _least(self, values: Values) -> npt.NDArray[np.intp]:
        """At least NUM_CANDIDATES places, as far as there are so many that are evictable."""
        least = (
            np.partition(values, NUM_CANDIDATES)[:NUM_CANDIDATES]
            if len(values) > NUM_CANDIDATES
            else values
        )
        self._bound = float(least.max(initial=-np.inf, where=least < np.inf))
        return np.flatnonzero(values <= self._bound)
