"""Which resident expert goes next: 2 layers of 4 experts, all resident at first."""

import numpy as np
import pytest

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Frames, Geometry
from sglmoe.memory.eviction import Clock
from sglmoe.memory.expert_order import NUM_CANDIDATES, ExpertOrder
from sglmoe.memory.expert_values import values_for
from sglmoe.memory.experts import ABSENT, ExpertTable, Load
from sglmoe.memory.prices import Prices

GEOMETRY = Geometry(
    num_frames=8,
    frame_bytes=1000,
    expert_bytes=1000,
    page_bytes=500,
    page_tokens=4,
    pages_per_frame=2,
    page_rows=16,
)


class Experts:
    """A table and its order."""

    def __init__(self, policy: MemoryPolicy, *, num_layers: int = 2, num_experts: int = 4) -> None:
        clock = Clock()
        self.frames = Frames(num_layers * num_experts)
        self.table = ExpertTable(num_layers, num_experts, frames=self.frames)
        values = values_for(policy, (num_layers, num_experts), clock=clock, prices=Prices(GEOMETRY))
        self.order = ExpertOrder(self.table, values, clock=clock)
        for layer in range(num_layers):
            for expert in range(num_experts):
                self.place(layer, expert)

    def place(self, layer: int, expert: int) -> None:
        self.table.place(Load(self.frames.take_for_expert(layer, expert), layer, expert))

    def use(self, layer: int, *experts: int) -> None:
        self.order.use(layer, np.array(experts))

    def step(self, *layers: list[int]) -> None:
        self.order.begin_step()
        for layer, experts in enumerate(layers):
            self.use(layer, *experts)

    def evict(self) -> tuple[int, int] | None:
        first = self.order.first()
        if first is None:
            return None
        self.table.evict(first.layer, first.expert)
        return first.layer, first.expert

    def evict_all(self) -> list[tuple[int, int]]:
        found = []
        while (expert := self.evict()) is not None:
            found.append(expert)
        return found


def test_lru_evicts_what_was_used_longest_ago_and_of_equals_the_lowest_number() -> None:
    experts = Experts(MemoryPolicy.LRU)
    experts.step([0, 1, 2, 3], [3, 1])
    experts.use(0, 2)
    # Never used; used first, layer by layer; used last.
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


def test_what_is_used_or_pinned_meanwhile_is_passed_over() -> None:
    experts = Experts(MemoryPolicy.LRU)
    experts.use(0, 0, 1, 2, 3)
    assert experts.evict() == (1, 0)  # (1, 1) is next by now
    experts.use(1, 1)
    experts.table.pin(1, np.array([2]))
    assert experts.evict() == (1, 3)
    assert experts.evict() == (0, 0)
    experts.table.unpin()
    experts.order.layer_done()
    assert experts.evict() == (1, 2)


def test_uses_are_remembered_beyond_eviction() -> None:
    experts = Experts(MemoryPolicy.LFU, num_layers=1)
    for _ in range(2):
        experts.use(0, 0, 1)
    experts.use(0, 2, 3)
    assert [experts.evict(), experts.evict()] == [(0, 2), (0, 3)]
    experts.place(0, 2)
    experts.use(0, 2)  # for the second time: as often as 0 and 1
    assert experts.evict_all() == [(0, 0), (0, 1), (0, 2)]


def test_first_of_a_layer() -> None:
    experts = Experts(MemoryPolicy.STATIC)
    experts.use(1, 0, 1, 2)
    experts.use(1, 0, 3)
    first = experts.order.first_of(1)
    assert first is not None
    assert (first.layer, first.expert) == (1, 1)
    few = experts.order.first_few_of(1, 3)
    assert [its.expert for its in few] == [1, 2, 0]
    assert [its.value for its in few] == sorted(its.value for its in few)
    assert len(experts.order.first_few_of(1, 9)) == 4
    experts.table.pin(1, np.arange(4))
    assert experts.order.first_of(1) is None


def test_more_experts_than_are_picked_at_once_go_in_order() -> None:
    num_experts = 2 * NUM_CANDIDATES + 3
    experts = Experts(MemoryPolicy.LRU, num_layers=1, num_experts=num_experts)
    order = np.random.default_rng(0).permutation(num_experts)
    for expert in order.tolist():
        experts.use(0, expert)
    assert experts.evict_all() == [(0, expert) for expert in order.tolist()]


@pytest.mark.parametrize("policy", [MemoryPolicy.LRU, MemoryPolicy.LFU, MemoryPolicy.COST_AWARE])
def test_whoever_was_picked_before_the_least_valuable_goes(policy: MemoryPolicy) -> None:
    """As values drift, those that are worth less than the last ones picked are none, some, or more than are looked at."""
    random = np.random.default_rng(0)
    num_experts = 3 * NUM_CANDIDATES
    experts = Experts(policy, num_experts=num_experts)
    chances = random.random((2, num_experts)) ** 2
    for _ in range(8):
        experts.order.begin_step()
        for layer in (0, 1):
            experts.use(layer, *np.flatnonzero(random.random(num_experts) < chances[layer]))
            evictable, values = experts.table.evictable(), experts.order.values.now()
            least = np.where(evictable, values, np.inf)
            for _ in range(int(random.integers(1, 2 * NUM_CANDIDATES))):
                if (victim := experts.evict()) is None:
                    break
                assert victim == divmod(int(least.argmin()), num_experts)
                least[victim] = np.inf
            for gone in np.argwhere(experts.table.frame_table == ABSENT)[::2].tolist():
                experts.place(*gone)


def test_cleared_has_forgotten_all() -> None:
    experts = Experts(MemoryPolicy.LFU)
    experts.use(1, 0, 1, 2, 3)
    experts.use(0, 0, 1, 2)
    experts.order.clear()
    assert experts.evict() == (0, 0)


def test_where_all_are_used_in_every_step_the_layer_just_passed_goes_first() -> None:
    """LRU would drop the layer that is needed next, each time: Belady drops the one needed last."""
    experts = Experts(MemoryPolicy.COST_AWARE, num_layers=3, num_experts=2)
    for _ in range(4):
        experts.step([0, 1], [0, 1], [0, 1])
    experts.order.begin_step()
    experts.use(0, 0, 1)
    experts.use(1, 0, 1)
    experts.table.pin(1, np.array([0, 1]))
    # Layer 2 comes next, then layer 0 in the next step; layer 1 runs.
    assert experts.evict_all() == [(0, 0), (0, 1), (2, 0), (2, 1)]


def test_how_often_an_expert_is_used_counts_more_than_where_it_is() -> None:
    experts = Experts(MemoryPolicy.COST_AWARE)
    # In 8 steps expert 0 of each layer is used always, 1 every other time, 2 once, 3 never.
    for number in range(8):
        used = [0, *([1] if number % 2 else []), *([2] if number == 3 else [])]
        experts.step(used, used)
    experts.order.begin_step()
    # Between steps layer 0 comes next: of equals layer 1 is farther away.
    assert experts.evict_all() == [(layer, e) for e in (3, 2, 1, 0) for layer in (1, 0)]
