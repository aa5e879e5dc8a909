"""The clock that uses are stamped with, and which cached prefix is the next to go.

Experts have an order of their own, `expert_order`. Neither evicts; `MemoryManager` compares the two.
"""

from heapq import heappop, heappush
from typing import Generic, Protocol, TypeVar

from sglmoe.config import MemoryPolicy
from sglmoe.memory.prices import Prices
from sglmoe.memory.reuse_rates import NUM_CLASSES, ReuseRates, class_of

NOT_QUEUED = -1


class Clock:
    """Counts uses. What counts as used at once has one time."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0

    def tick(self) -> None:
        """Let what is used from now on count as used later than all before."""
        self.now += 1


class Leaf(Protocol):
    """A node of the radix tree. `queue` belongs to the order."""

    last_use: int  # the clock's time
    idle_since: int  # the step in which it became idle
    num_uses: int  # by requests that came after the first one
    queue: int

    @property
    def is_evictable(self) -> bool:
        """Whether it holds memory that nobody needs right now."""


L = TypeVar("L", bound=Leaf)


class LeafOrder(Generic[L]):
    """Heaps with lazy updates: a use costs nothing, the next victim O(log n).

    There is a heap for each class of leaves that the policy tells apart; within one, what was used
    longest ago (LFU: least often) goes first, and these firsts are compared by value. Every
    evictable leaf has exactly one entry in the heap of its class, whose key may lag behind: keys
    only grow, so an entry that comes first with an outdated key goes back with the current one. An
    entry whose leaf is not evictable when it comes first is dropped; whoever makes that leaf
    evictable again must `add` it.
    """

    def __init__(self, policy: MemoryPolicy, *, reuse: ReuseRates, prices: Prices) -> None:
        self._policy = policy
        self._reuse = reuse
        self._prices = prices
        num_queues = NUM_CLASSES if policy is MemoryPolicy.COST_AWARE else 1
        # By queue: key, number of the entry (breaks ties), leaf.
        self._queues: list[list[tuple[int, int, L]]] = [[] for _ in range(num_queues)]
        self._num_entries = 0  # ever made

    def add(self, leaf: L) -> None:
        """Enter the leaf unless it is in the order already, or not evictable."""
        if leaf.is_evictable and leaf.queue != self._queue_of(leaf):
            self._push(leaf)

    def first(self) -> L | None:
        """The leaf to evict next; it stays in the order until it is evictable no more."""
        heads = [head for queue in range(len(self._queues)) if (head := self._head(queue))]
        return min(heads, key=self.value, default=None)

    def value(self, leaf: L) -> float:
        """What is lost with it, as the policy measures that: seconds per byte and step, a time or a count."""
        if self._policy is MemoryPolicy.COST_AWARE:
            return self._reuse.rate(leaf.num_uses, leaf.idle_since) * self._prices.kv_byte
        return self._key(leaf)

    def first_few(self, num_leaves: int) -> list[L]:
        """The leaves to evict next, in their order; they stay in it. O(num_leaves log n)."""
        entries: list[tuple[int, int, L]] = []
        while len(entries) < num_leaves and (leaf := self.first()) is not None:
            entries.append(heappop(self._queues[leaf.queue]))
        for entry in entries:
            heappush(self._queues[entry[2].queue], entry)
        return [leaf for _, _, leaf in entries]

    def violations(self, evictable: set[L]) -> list[str]:
        """`evictable` are all the leaves that should be in the order."""
        queued = [
            leaf
            for queue, entries in enumerate(self._queues)
            for _, _, leaf in entries
            if leaf.queue == queue
        ]
        found = []
        if len(queued) != len(set(queued)):
            found.append("a leaf is in the eviction order twice")
        if missing := len(evictable.difference(queued)):
            found.append(f"{missing} evictable leaves are not in the eviction order")
        return found

    def _queue_of(self, leaf: L) -> int:
        return class_of(leaf.num_uses) if len(self._queues) > 1 else 0

    def _key(self, leaf: L) -> int:
        return leaf.num_uses if self._policy is MemoryPolicy.LFU else leaf.last_use

    def _head(self, queue: int) -> L | None:
        entries = self._queues[queue]
        while entries:
            key, _, leaf = entries[0]
            if leaf.queue == queue and leaf.is_evictable and key == self._key(leaf):
                return leaf
            heappop(entries)
            if leaf.queue == queue:
                leaf.queue = NOT_QUEUED
                self.add(leaf)
        return None

    def _push(self, leaf: L) -> None:
        self._num_entries += 1
        leaf.queue = self._queue_of(leaf)
        heappush(self._queues[leaf.queue], (self._key(leaf), self._num_entries, leaf))
