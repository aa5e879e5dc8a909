"""Which leaf goes first."""

import pytest

from sglmoe.config import MemoryPolicy
from sglmoe.memory.eviction import Clock, LeafOrder


class Thing:
    """A leaf, evictable at will, last used when it was made."""

    def __init__(self, clock: Clock):
        clock.tick()
        self.last_use = clock.now
        self.num_uses = 0
        self.queued = False
        self.is_evictable = True

    def use(self, clock: Clock) -> None:
        clock.tick()
        self.last_use = clock.now
        self.num_uses += 1


Order = LeafOrder[Thing]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def three_leaves(clock: Clock, policy: MemoryPolicy) -> tuple[Order, list[Thing]]:
    order: Order = LeafOrder(policy)
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
    order: Order = LeafOrder(MemoryPolicy.LRU)
    locked, leaf = Thing(clock), Thing(clock)
    locked.is_evictable = False
    for thing in (locked, leaf, leaf):
        order.add(thing)
    assert order.violations({leaf}) == []
    assert [evict(order), evict(order)] == [leaf, None]


def test_the_first_few_are_in_the_order_of_eviction_and_stay_in_it(clock: Clock) -> None:
    order, (first, second, third) = three_leaves(clock, MemoryPolicy.LRU)
    first.use(clock)
    assert order.first_few(2) == [second, third]
    assert order.first_few(9) == [second, third, first]
    assert order.violations({first, second, third}) == []
    assert [evict(order) for _ in range(4)] == [second, third, first, None]
    assert order.first_few(2) == []
