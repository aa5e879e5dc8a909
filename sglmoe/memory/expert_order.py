"""Which resident expert is the next to go."""

from typing import NamedTuple

import numpy as np

from sglmoe.memory.eviction import Clock
from sglmoe.memory.expert_values import ExpertValues, Probabilities
from sglmoe.memory.experts import ExpertIds, ExpertTable

# Victims are picked so many at once: finding one takes as long as finding all of these.
NUM_CANDIDATES = 128


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
        self._candidates: list[tuple[int, float]] = []  # place in the table, value; the least last

    def begin_step(self) -> None:
        """The next uses are those of another forward pass."""
        self._candidates.clear()
        self.values.begin_step()

    def use(self, layer: int, experts: ExpertIds) -> None:
        """Note that these are used now."""
        self._candidates.clear()
        self._clock.tick()
        self.values.use(layer, experts)

    def expect(self, layer: int, probabilities: Probabilities) -> None:
        """See `ExpertValues.expect`."""
        self._candidates.clear()
        self.values.expect(layer, probabilities)

    def layer_done(self) -> None:
        """Its experts have no pins any more."""
        self._candidates.clear()

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
        values = np.where(self._table.evictable()[layer], self.values.now()[layer], np.inf)
        expert = int(values.argmin())
        return None if values[expert] == np.inf else Candidate(layer, expert, float(values[expert]))

    def clear(self) -> None:
        """Forget all uses."""
        self._candidates.clear()
        self.values.clear()

    def _pick_candidates(self) -> bool:
        """Find the least valuable; False if none is evictable."""
        evictable = np.flatnonzero(self._table.evictable())
        values = self.values.now().ravel()[evictable]
        if len(values) > NUM_CANDIDATES:
            bound = np.partition(values, NUM_CANDIDATES)[NUM_CANDIDATES]
            few = values <= bound
            evictable, values = evictable[few], values[few]
        order = values.argsort(kind="stable")[::-1]
        self._candidates = [*zip(evictable[order].tolist(), values[order].tolist(), strict=True)]
        return bool(self._candidates)
