"""In which order things leave the arena: least recently used first, experts and cached prefixes in
one order.

The order knows neither frames nor pages: it ranks entities and never evicts. `_key` is the only
place that says what an entity is worth.
"""

from enum import Enum
from heapq import heappop, heappush
from typing import ClassVar


class Tenant(Enum):
    """Who competes for the arena."""

    EXPERT = "expert"
    KV = "kv"


class Evictable:
    """Something that can be in an `EvictionOrder`; `last_use` and `queued` belong to the order."""

    __slots__ = ("last_use", "queued")

    tenant: ClassVar[Tenant]

    def __init__(self) -> None:
        self.last_use = 0
        self.queued = False

    @property
    def is_evictable(self) -> bool:
        """Whether it holds memory that nobody needs right now."""
        raise NotImplementedError


_Entry = tuple[int, int, Evictable]  # key, number of the entry (breaks ties), entity


class EvictionOrder:
    """A heap per tenant with lazy updates, popped by one common key.

    Every evictable entity has exactly one entry, whose key may lag behind: keys only grow, so an
    entry that is popped with an outdated key goes back with the current one. An entry whose entity
    is not evictable when it is popped is dropped; whoever makes that entity evictable again must
    `add` it.
    """

    def __init__(self) -> None:
        self._heaps: dict[Tenant, list[_Entry]] = {tenant: [] for tenant in Tenant}
        self._clock = 0
        self._num_entries = 0  # ever made

    def tick(self) -> None:
        """Let what is touched from now on count as used later than all before."""
        self._clock += 1

    def touch(self, entity: Evictable) -> None:
        """Note that the entity is used now."""
        entity.last_use = self._clock

    def add(self, entity: Evictable) -> None:
        """Enter the entity unless it is in the order already, or not evictable."""
        if not entity.queued and entity.is_evictable:
            self._push(entity)

    def pop(self, *tenants: Tenant) -> Evictable | None:
        """Take out the entity of these tenants to evict next; None if they have none.

        The caller evicts it, or evicts a part of it and adds it again.
        """
        fresh = [heap for tenant in tenants if self._freshen(heap := self._heaps[tenant])]
        if not fresh:
            return None
        entity = heappop(min(fresh, key=_first_entry))[2]
        entity.queued = False
        return entity

    def violations(self, tenant: Tenant, evictable: set[Evictable]) -> list[str]:
        """`evictable` are all the tenant's entities that should be in the order."""
        queued = [entity for _, _, entity in self._heaps[tenant]]
        found = []
        if len(queued) != len(set(queued)):
            found.append(f"an entity of {tenant.value} is in the eviction order twice")
        if missing := len(evictable.difference(queued)):
            found.append(f"{missing} evictable of {tenant.value} are not in the eviction order")
        if not all(entity.queued for entity in queued):
            found.append(f"an entity of {tenant.value} in the eviction order is not marked so")
        return found

    def _push(self, entity: Evictable) -> None:
        self._num_entries += 1
        entity.queued = True
        heappush(self._heaps[entity.tenant], (_key(entity), self._num_entries, entity))

    def _freshen(self, heap: list[_Entry]) -> bool:
        """Make the heap's first entry current and evictable; False if that empties the heap."""
        while heap:
            key, _, entity = heap[0]
            if not entity.is_evictable:
                heappop(heap)
                entity.queued = False
            elif key != _key(entity):
                heappop(heap)
                self._push(entity)
            else:
                return True
        return False


def _key(entity: Evictable) -> int:
    """Lowest goes first."""
    return entity.last_use


def _first_entry(heap: list[_Entry]) -> _Entry:
    return heap[0]
