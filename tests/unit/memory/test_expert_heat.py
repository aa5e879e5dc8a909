"""Which resident expert goes next: 2 layers of 4 experts, all resident at first."""

import numpy as np

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Frames
from sglmoe.memory.eviction import Clock
from sglmoe.memory.expert_heat import NUM_CANDIDATES, ExpertHeat
from sglmoe.memory.experts import ExpertTable, Load


class Experts:
    """A table and its heat."""

    def __init__(self, policy: MemoryPolicy, *, num_layers: int = 2, num_experts: int = 4) -> None:
        self.frames = Frames(num_layers * num_experts)
        self.table = ExpertTable(num_layers, num_experts, frames=self.frames)
        self.heat = ExpertHeat(self.table, policy=policy, clock=Clock())
        for layer in range(num_layers):
            for expert in range(num_experts):
                self.place(layer, expert)

    def place(self, layer: int, expert: int) -> None:
        self.table.place(Load(self.frames.take_for_expert(layer, expert), layer, expert))

    def use(self, layer: int, *experts: int) -> None:
        self.heat.use(layer, np.array(experts))

    def evict(self) -> tuple[int, int] | None:
        coldest = self.heat.coldest()
        if coldest is None:
            return None
        self.table.evict(coldest.layer, coldest.expert)
        return coldest.layer, coldest.expert

    def evict_all(self) -> list[tuple[int, int]]:
        found = []
        while (expert := self.evict()) is not None:
            found.append(expert)
        return found


def test_lru_evicts_what_was_used_longest_ago_and_of_equals_the_lowest_number() -> None:
    experts = Experts(MemoryPolicy.LRU)
    experts.use(0, 0, 1, 2, 3)
    experts.use(1, 3, 1)
    experts.use(0, 2)
    # Never used; used in the first step, layer by layer; used in the second.
    assert experts.evict_all() == [
        *[(1, 0), (1, 2)],
        *[(0, 0), (0, 1), (0, 3), (1, 1), (1, 3)],
        (0, 2),
    ]
    assert experts.evict() is None


def test_lfu_evicts_what_was_used_least_often_whenever_that_was() -> None:
    experts = Experts(MemoryPolicy.LFU)
    for _ in range(3):
        experts.use(0, 0, 1)
    experts.use(0, 2, 3)
    experts.use(1, 0, 1, 2, 3)
    experts.use(1, 2)
    assert experts.evict_all() == [(0, 2), (0, 3), (1, 0), (1, 1), (1, 3), (1, 2), (0, 0), (0, 1)]


def test_a_candidate_that_is_used_meanwhile_or_pinned_is_passed_over() -> None:
    experts = Experts(MemoryPolicy.LRU)
    experts.use(0, 0, 1, 2, 3)
    assert experts.evict() == (1, 0)  # (1, 1) is next by now
    experts.use(1, 1)
    experts.table.pin(1, np.array([2]))
    assert experts.evict() == (1, 3)
    assert experts.evict() == (0, 0)
    experts.table.unpin()
    experts.use(0, 3)  # a new step: all are ranked anew
    assert experts.evict() == (1, 2)


def test_heat_outlives_eviction() -> None:
    experts = Experts(MemoryPolicy.LFU, num_layers=1)
    for _ in range(2):
        experts.use(0, 0, 1)
    experts.use(0, 2, 3)
    assert [experts.evict(), experts.evict()] == [(0, 2), (0, 3)]
    experts.place(0, 2)
    experts.use(0, 2)  # for the second time: as often as 0 and 1
    assert experts.evict_all() == [(0, 0), (0, 1), (0, 2)]


def test_coldest_of_a_layer() -> None:
    experts = Experts(MemoryPolicy.STATIC)
    experts.use(1, 0, 1, 2)
    experts.use(1, 0, 3)
    coldest = experts.heat.coldest_of(1)
    assert coldest is not None
    assert (coldest.layer, coldest.expert) == (1, 1)
    experts.table.pin(1, np.arange(4))
    assert experts.heat.coldest_of(1) is None


def test_more_experts_than_are_picked_at_once_go_in_order() -> None:
    num_experts = 2 * NUM_CANDIDATES + 3
    experts = Experts(MemoryPolicy.LRU, num_layers=1, num_experts=num_experts)
    order = np.random.default_rng(0).permutation(num_experts)
    for expert in order.tolist():
        experts.use(0, expert)
    assert experts.evict_all() == [(0, expert) for expert in order.tolist()]


def test_cleared_has_forgotten_all() -> None:
    experts = Experts(MemoryPolicy.LFU)
    experts.use(1, 0, 1, 2, 3)
    experts.use(0, 0, 1, 2)
    experts.heat.clear()
    assert experts.evict() == (0, 0)
