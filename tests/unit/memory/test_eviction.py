"""Who goes first."""

from sglmoe.memory.eviction import Evictable, EvictionOrder, Tenant


class Thing(Evictable):
    """Evictable at will."""

    __slots__ = ("evictable",)

    def __init__(self, order: EvictionOrder, *, add: bool = True):
        super().__init__()
        self.evictable = True
        order.touch(self)
        order.tick()
        if add:
            order.add(self)

    @property
    def is_evictable(self) -> bool:
        return self.evictable


class OfExperts(Thing):
    tenant = Tenant.EXPERT


class OfKv(Thing):
    tenant = Tenant.KV


def test_least_recently_used_of_both_tenants_goes_first() -> None:
    order = EvictionOrder()
    first, second, third = OfExperts(order), OfKv(order), OfExperts(order)
    order.touch(first)
    assert order.pop(Tenant.EXPERT, Tenant.KV) is second
    assert order.pop(Tenant.EXPERT, Tenant.KV) is third
    assert order.pop(Tenant.EXPERT, Tenant.KV) is first
    assert order.pop(Tenant.EXPERT, Tenant.KV) is None


def test_one_tenant_can_be_spared() -> None:
    order = EvictionOrder()
    expert, leaf = OfExperts(order), OfKv(order)
    assert order.pop(Tenant.KV) is leaf
    assert order.pop(Tenant.KV) is None
    assert order.pop(Tenant.EXPERT) is expert


def test_equal_last_use_goes_in_the_order_of_entry() -> None:
    order = EvictionOrder()
    expert, leaf = OfExperts(order), OfKv(order)
    order.touch(leaf)
    order.touch(expert)
    # Their keys are outdated: the expert's entry is renewed first, as that heap is looked at first.
    assert order.pop(Tenant.EXPERT, Tenant.KV) is expert
    assert order.pop(Tenant.EXPERT, Tenant.KV) is leaf


def test_what_is_not_evictable_is_dropped_until_it_is_added_again() -> None:
    order = EvictionOrder()
    expert = OfExperts(order)
    expert.evictable = False
    assert order.pop(Tenant.EXPERT) is None
    expert.evictable = True
    assert order.violations(Tenant.EXPERT, {expert}) == [
        "1 evictable of expert are not in the eviction order"
    ]
    order.add(expert)
    assert order.violations(Tenant.EXPERT, {expert}) == []
    assert order.pop(Tenant.EXPERT) is expert


def test_adding_twice_makes_one_entry_and_adding_what_may_not_go_none() -> None:
    order = EvictionOrder()
    expert = OfExperts(order)
    order.add(expert)
    pinned = OfExperts(order, add=False)
    pinned.evictable = False
    order.add(pinned)
    assert order.pop(Tenant.EXPERT) is expert
    assert order.pop(Tenant.EXPERT) is None


def test_popped_and_added_again_it_keeps_its_turn() -> None:
    # The manager evicts the end of a leaf and adds the rest again.
    order = EvictionOrder()
    oldest, _ = OfKv(order), OfKv(order)
    assert order.pop(Tenant.KV) is oldest
    order.add(oldest)
    assert order.pop(Tenant.KV) is oldest
