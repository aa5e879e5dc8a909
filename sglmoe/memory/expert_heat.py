"""How warm each expert is, and so which resident is evicted next: the coldest."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sglmoe.config import MemoryPolicy
from sglmoe.memory.eviction import Clock
from sglmoe.memory.experts import ExpertIds, ExpertTable

# Victims are picked so many at once: finding one takes as long as finding all of these.
NUM_CANDIDATES = 128


class Candidate(NamedTuple):
    """A resident that was among the coldest."""

    layer: int
    expert: int
    heat: float


class ExpertHeat:
    """Heat of all experts, resident or not: float64 `[num_layers, num_experts]`. It only grows.

    LRU and STATIC: when an expert was last used; LFU: how often.
    """

    def __init__(self, table: ExpertTable, *, policy: MemoryPolicy, clock: Clock):
        self.heat: npt.NDArray[np.float64] = np.zeros(table.frame_table.shape)
        self._table = table
        self._policy = policy
        self._clock = clock
        self._uses: list[tuple[int, ExpertIds, int]] = []  # not in `heat` yet
        self._last_layer = -1
        self._candidates: list[Candidate] = []  # the coldest last

    def use(self, layer: int, experts: ExpertIds) -> None:
        """Note that these are used now. A layer that does not follow the last one begins a step."""
        if layer <= self._last_layer:
            self._begin_step()
        self._last_layer = layer
        self._clock.tick()
        self._uses.append((layer, experts, self._clock.now))

    def coldest(self) -> Candidate | None:
        """The evictable resident to go first; None if there is none.

        Its rank is that at the beginning of the step, unless it has been used since.
        """
        self._count_uses()
        while True:
            while self._candidates:
                candidate = self._candidates[-1]
                if self._is_current(candidate):
                    return candidate
                self._candidates.pop()
            if not self._pick_candidates():
                return None

    def coldest_of(self, layer: int) -> Candidate | None:
        """The same within one layer."""
        self._count_uses()
        heat = np.where(self._table.evictable()[layer], self.heat[layer], np.inf)
        expert = int(heat.argmin())
        return None if heat[expert] == np.inf else Candidate(layer, expert, float(heat[expert]))

    def clear(self) -> None:
        """Forget all uses."""
        self.heat[:] = 0
        self._uses.clear()
        self._candidates.clear()
        self._last_layer = -1

    def _begin_step(self) -> None:
        self._count_uses()
        self._candidates.clear()

    def _count_uses(self) -> None:
        for layer, experts, now in self._uses:
            if self._policy is MemoryPolicy.LFU:
                self.heat[layer, experts] += 1
            else:
                self.heat[layer, experts] = now
        self._uses.clear()

    def _is_current(self, candidate: Candidate) -> bool:
        layer, expert, heat = candidate
        return self.heat[layer, expert] == heat and self._table.is_evictable(layer, expert)

    def _pick_candidates(self) -> bool:
        """Find the coldest; of equals those of the lowest numbers. False if none is evictable."""
        evictable = np.flatnonzero(self._table.evictable())
        heat = self.heat.ravel()[evictable]
        if len(heat) > NUM_CANDIDATES:
            bound = np.partition(heat, NUM_CANDIDATES)[NUM_CANDIDATES]
            few = heat <= bound
            evictable, heat = evictable[few], heat[few]
        order = heat.argsort(kind="stable")[::-1]
        num_experts = self.heat.shape[1]
        self._candidates = [
            Candidate(number // num_experts, number % num_experts, warmth)
            for number, warmth in zip(evictable[order].tolist(), heat[order].tolist(), strict=True)
        ]
        return bool(self._candidates)
