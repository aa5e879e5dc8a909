"""Which leaf goes first."""

import pytest

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Geometry
from sglmoe.memory.eviction import NOT_QUEUED, Clock, LeafOrder
from sglmoe.memory.prices import Prices
from sglmoe.memory.reuse_rates import ReuseRates

GEOMETRY = Geometry(
    num_frames=8,
    frame_bytes=1000,
    expert_bytes=1000,
    page_bytes=500,
    page_tokens=2,
    pages_per_frame=2,
    page_rows=16,
)


class Thing:
    """A leaf, evictable at will, last used when it was made."""

    def __init__(self, clock: Clock):
        clock.tick()
        self.last_use = clock.now
        self.num_uses = 0
        self.idle_since = 0
        self.queue = NOT_QUEUED
        self.is_evictable = True

    def use(self, clock: Clock) -> None:
        clock.tick()
        self.last_use = clock.now
        self.num_uses += 1


Order = LeafOrder[Thing]


def new_order(policy: MemoryPolicy, reuse: ReuseRates | None = None) -> Order:
    return LeafOrder(policy, reuse=reuse or ReuseRates(), prices=Prices(GEOMETRY))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def three_leaves(clock: Clock, policy: MemoryPolicy) -> tuple[Order, list[Thing]]:
    order = new_order(policy)
    leaves = [Thing(clock) for _ in range(3)]
    for leaf in leaves:
        order.add(leaf)
    return order, leaves


def evict(order: Order) -> Thing | None:
    leaf = order.first()
    if leaf is not None:
        leaf.is_evictable = False
    return leaf


def test_least_recently_used_goes_first(clock: Clock) -> None:
    order, (first, second, third) = three_leaves(clock, MemoryPolicy.LRU)
    first.use(clock)
    assert [evict(order) for _ in range(4)] == [second, third, first, None]


def test_least_often_used_goes_first_and_of_equals_the_one_added_first(clock: Clock) -> None:
    order, (first, second, third) = three_leaves(clock, MemoryPolicy.LFU)
    first.use(clock)
    first.use(clock)
    second.use(clock)
    assert [evict(order) for _ in range(4)] == [third, second, first, None]
    order, leaves = three_leaves(clock, MemoryPolicy.LFU)
    assert [evict(order) for _ in range(3)] == leaves


def test_first_stays_first_until_it_is_gone(clock: Clock) -> None:
    # The manager evicts the end of a leaf; the rest is still there.
    order, (first, second, _) = three_leaves(clock, MemoryPolicy.LRU)
    assert order.first() is first
    assert order.first() is first
    first.is_evictable = False
    assert order.first() is second


def test_what_is_not_evictable_is_dropped_until_it_is_added_again(clock: Clock) -> None:
    order, (first, second, _) = three_leaves(clock, MemoryPolicy.LRU)
    first.is_evictable = False
    assert order.first() is second
    first.is_evictable = True
    assert order.violations({first}) == ["1 evictable leaves are not in the eviction order"]
    order.add(first)
    assert order.violations({first}) == []
    assert order.first() is first


def test_adding_twice_makes_one_entry_and_adding_what_may_not_go_none(clock: Clock) -> None:
    order = new_order(MemoryPolicy.LRU)
    locked, leaf = Thing(clock), Thing(clock)
    locked.is_evictable = False
    for thing in (locked, leaf, leaf):
        order.add(thing)
    assert order.violations({leaf}) == []
    assert [evict(order), evict(order)] == [leaf, None]


def test_by_cost_a_leaf_that_was_found_before_outlives_younger_ones_that_never_were(
    clock: Clock,
) -> None:
    order, (first, second, third) = three_leaves(clock, MemoryPolicy.COST_AWARE)
    first.use(clock)
    order.add(first)  # it is in another class now
    assert order.violations({first, second, third}) == []
    fourth = Thing(clock)
    order.add(fourth)
    assert [evict(order) for _ in range(5)] == [second, third, fourth, first, None]


def test_by_cost_what_has_been_idle_long_enough_goes_first_though_it_was_found_before(
    clock: Clock,
) -> None:
    reuse = ReuseRates()
    order = new_order(MemoryPolicy.COST_AWARE, reuse)
    old, young = Thing(clock), Thing(clock)
    old.num_uses = 1
    for _ in range(10_000):
        reuse.begin_step()
    young.idle_since = reuse.step
    for leaf in (young, old):
        order.add(leaf)
    assert order.value(old) < order.value(young)
    assert [evict(order), evict(order)] == [old, young]


def test_a_leaf_is_worth_what_its_reuse_would_save() -> None:
    # 4 us to prefill a token, 2 tokens in a page of 500 bytes.
    reuse, prices = ReuseRates(), Prices(GEOMETRY)
    prices.token_nanoseconds = 4000
    order: Order = LeafOrder(MemoryPolicy.COST_AWARE, reuse=reuse, prices=prices)
    leaf = Thing(Clock())
    assert order.value(leaf) == pytest.approx(reuse.rate(0, 0) * 2 * 4e-6 / 500)


def test_the_first_few_are_in_the_order_of_eviction_and_stay_in_it(clock: Clock) -> None:
    order, (first, second, third) = three_leaves(clock, MemoryPolicy.LRU)
    first.use(clock)
    assert order.first_few(2) == [second, third]
    assert order.first_few(9) == [second, third, first]
    assert order.violations({first, second, third}) == []
    assert [evict(order) for _ in range(4)] == [second, third, first, None]
    assert order.first_few(2) == []
