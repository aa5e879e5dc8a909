"""Passes over many tokens: the next layer's experts come while this one computes.

FluxMoE (arXiv 2604.02715, section 3) materialises whole layers in a ring of two. Here the ring is the arena: a layer that
computes is pinned, the next one's experts take frames of layers that are over, and the currency says so by itself once it
is told what is certain: that this pass will use nearly all of them.
"""

import math
import time
from collections.abc import Callable

import numpy as np

from sglmoe.memory.expert_order import ExpertOrder
from sglmoe.memory.experts import ABSENT, ExpertIds, ExpertTable
from sglmoe.memory.prefetch import Wanted
from sglmoe.memory.prefetches import Prefetches
from sglmoe.memory.prices import Prices

# Passes over more tokens use most experts of every layer, and compute long enough for the link to be idle.
BULK_TOKENS = 256
# Below it, whole layers would bring more than one expert in four for nothing.
LEAST_COVERAGE = 0.75


class LayerStreaming:
    """Watches how much of its layers a pass over many tokens uses.

    While that is most of them, memory expects the layers ahead to be used as much, and what is absent of the next one is
    begun as soon as this layer's own loads are: it gives way to these, chunk by chunk. No more is begun than the link moves
    while a layer computes, as the last one did: where it is busy anyway, frames lent to the layer ahead are missed by others.
    `stalled` gives the seconds that layers have waited, since the start.
    """

    def __init__(
        self,
        table: ExpertTable,
        order: ExpertOrder,
        *,
        prefetches: Prefetches,
        prices: Prices,
        stalled: Callable[[], float],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._table = table
        self._order = order
        self._prefetches = prefetches
        self._prices = prices
        self._stalled = stalled
        self._clock = clock
        self._compute_seconds = math.inf  # of the last layer; none has been measured
        self._began = 0.0  # the layer: by the clock, without the waits until then
        self._num_layers, self._num_experts = table.frame_table.shape
        self._is_bulk = False  # this forward pass
        self._layers_seen = self._experts_used = 0  # in it
        self.is_paused = False
        self.num_streamed = 0  # experts begun so, since the start

    def begin_step(self, num_tokens: int) -> None:
        """Another forward pass, over so many tokens."""
        self._is_bulk = num_tokens > BULK_TOKENS
        self._layers_seen = self._experts_used = 0

    def layer_begins(self, layer: int, experts: ExpertIds) -> None:
        """The layer uses these, and memory has been told so."""
        if not self._is_bulk:
            return
        now = self._clock() - self._stalled()
        if self._layers_seen:
            self._compute_seconds = now - self._began
        self._began = now
        self._layers_seen += 1
        self._experts_used += len(experts)
        coverage = self._coverage()
        if coverage is not None and layer + 1 < self._num_layers:
            self._order.expect(layer, np.full(self._table.frame_table.shape, coverage))

    def loads_begun(self, layer: int) -> None:
        """The layer waits for nothing that is not on its way."""
        coverage, following = self._coverage(), layer + 1
        if coverage is None or following == self._num_layers:
            return
        absent = np.flatnonzero(self._table.frame_table[following] == ABSENT)
        limit = self._idle_loads() - self._prefetches.num_on_their_way
        if not len(absent) or limit <= 0:
            return
        values = self._order.now()[following, absent]
        first = absent[(-values).argsort(kind="stable")].tolist()
        wanted = (Wanted(following, expert, coverage) for expert in first)
        self.num_streamed += self._prefetches.begin(wanted, limit)

    def _idle_loads(self) -> int:
        """So many experts does the link move while a layer computes."""
        loads = self._compute_seconds * 1e9 / max(1, self._prices.expert_nanoseconds)
        return int(min(loads, self._num_experts))

    def _coverage(self) -> float | None:
        """The share of its layers' experts that this pass uses, if it is one to stream for."""
        if not self._is_bulk or self.is_paused:
            return None
        coverage = self._experts_used / max(1, self._layers_seen * self._num_experts)
        return coverage if coverage >= LEAST_COVERAGE else None
