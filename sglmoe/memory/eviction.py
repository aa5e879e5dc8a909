"""By which rule things leave the arena, the clock they are stamped with, and which cached prefix is next.

Experts have their own order, `expert_heat`; here is the one of radix leaves. Neither evicts.
"""

from heapq import heappop, heappush
from typing import Generic, Protocol, TypeVar

from sglmoe.config import MemoryPolicy


class Clock:
    """Counts uses. What counts as used at once has one time."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0

    def tick(self) -> None:
        """Let what is used from now on count as used later than all before."""
        self.now += 1


class Leaf(Protocol):
    """A node of the radix tree. `queued` belongs to the order."""

    last_use: int  # the clock's time
    num_uses: int  # by requests that came after the first one
    queued: bool

    @property
    def is_evictable(self) -> bool:
        """Whether it holds memory that nobody needs right now."""


L = TypeVar("L", bound=Leaf)


class LeafOrder(Generic[L]):
    """A heap with lazy updates: a use costs nothing, the next victim O(log n).

    Every evictable leaf has exactly one entry, whose key may lag behind: keys only grow, so an
    entry that comes first with an outdated key goes back with the current one. An entry whose leaf
    is not evictable when it comes first is dropped; whoever makes that leaf evictable again must
    `add` it.
    """

    def __init__(self, policy: MemoryPolicy) -> None:
        self._by_uses = policy is MemoryPolicy.LFU
        self._heap: list[tuple[int, int, L]] = []  # key, number of the entry (breaks ties), leaf
        self._num_entries = 0  # ever made

    def add(self, leaf: L) -> None:
        """Enter the leaf unless it is in the order already, or not evictable."""
        if not leaf.queued and leaf.is_evictable:
            self._push(leaf)

    def first(self) -> L | None:
        """The leaf to evict next; it stays in the order until it is evictable no more."""
        while self._heap:
            key, _, leaf = self._heap[0]
            if leaf.is_evictable and key == self.key(leaf):
                return leaf
            heappop(self._heap)
            leaf.queued = False
            self.add(leaf)
        return None

    def first_few(self, num_leaves: int) -> list[L]:
        """The leaves to evict next, in their order; they stay in it. O(num_leaves log n)."""
        entries: list[tuple[int, int, L]] = []
        while len(entries) < num_leaves and self.first() is not None:
            entries.append(heappop(self._heap))
        for entry in entries:
            heappush(self._heap, entry)
        return [leaf for _, _, leaf in entries]

    def key(self, leaf: L) -> int:
        """Lowest goes first."""
        return leaf.num_uses if self._by_uses else leaf.last_use

    def violations(self, evictable: set[L]) -> list[str]:
        """`evictable` are all the leaves that should be in the order."""
        queued = [leaf for _, _, leaf in self._heap]
        found = []
        if len(queued) != len(set(queued)):
            found.append("a leaf is in the eviction order twice")
        if missing := len(evictable.difference(queued)):
            found.append(f"{missing} evictable leaves are not in the eviction order")
        if not all(leaf.queued for leaf in queued):
            found.append("a leaf in the eviction order is not marked so")
        return found

    def _push(self, leaf: L) -> None:
        self._num_entries += 1
        leaf.queued = True
        heappush(self._heap, (self.key(leaf), self._num_entries, leaf))
