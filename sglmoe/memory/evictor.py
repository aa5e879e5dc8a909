"""Makes room: who gives way for new pages and for experts, by the value of what they hold.

Running requests' KV and pinned experts never do.
"""

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Frames
from sglmoe.memory.eviction import LeafOrder
from sglmoe.memory.expert_order import Candidate, ExpertOrder
from sglmoe.memory.experts import ExpertTable
from sglmoe.memory.kv_pages import PagePool
from sglmoe.memory.radix_cache import RadixCache, RadixNode


class Evictor:
    """Compares the least valuable expert with the least valuable prefix, and evicts.

    With MemoryPolicy.STATIC every layer has `layer_frames` frames for its experts, and KV the rest.
    """

    def __init__(
        self,
        policy: MemoryPolicy,
        *,
        frames: Frames,
        pool: PagePool,
        cache: RadixCache,
        leaves: LeafOrder[RadixNode],
        table: ExpertTable,
        experts: ExpertOrder,
        layer_frames: int,
    ):
        self._is_static = policy is MemoryPolicy.STATIC
        self._frames = frames
        self._pool = pool
        self._cache = cache
        self._leaves = leaves
        self._table = table
        self._experts = experts
        self._layer_frames = layer_frames
        self.experts_evicted = 0  # totals since the start: these two
        self.pages_evicted = 0

    def make_pages(self, num_pages: int) -> bool:
        """Evict until the pool has `num_pages` to hand out; False, and nothing evicted, if it never
        can."""
        num_unpinned = len(self._frames) - len(self._table.pinned)
        if num_pages > self._pool.most_pages(num_unpinned):
            return False
        while (num_missing := num_pages - self._pool.available_pages) > 0:
            victim = self._next_victim(experts=self._pool.may_grow, leaves=True)
            assert victim is not None, f"{num_missing} pages are neither free nor evictable"
            self._evict(victim, num_missing)
        return True

    def make_frame(self, layer: int, num_loading: int) -> bool:
        """Evict until a frame is free for an expert of this layer, of which `num_loading` are on
        their way; False if only pinned experts and pages of running requests are left."""
        if self._is_static:
            return self._make_frame_within(layer, num_loading)
        while not self._frames.num_free:
            # With a running request in every KV frame, evicting prefixes would free none.
            victim = self._next_victim(experts=True, leaves=self._pool.idle_frames > 0)
            if victim is None:
                return False
            self._evict(victim, None)
        return True

    def evict_leaf(self, leaf: RadixNode, num_pages: int) -> None:
        """Forget the last `num_pages` pages of an unlocked leaf."""
        pages = self._cache.evict(leaf, num_pages)
        self._pool.free(pages)
        self.pages_evicted += len(pages)

    def _make_frame_within(self, layer: int, num_loading: int) -> bool:
        """Keep the layer within its share."""
        if self._table.num_resident[layer] + num_loading < self._layer_frames:
            return True
        victim = self._experts.first_of(layer)
        if victim is not None:
            self._evict(victim, None)
        return victim is not None

    def _next_victim(self, *, experts: bool, leaves: bool) -> Candidate | RadixNode | None:
        """Of those who may go, whose turn it is; experts that have a share never give way to KV."""
        expert = self._experts.first() if experts and not self._is_static else None
        leaf = self._leaves.first() if leaves else None
        if expert is None or leaf is None:
            return leaf or expert
        return leaf if self._leaves.value(leaf) < expert.value else expert

    def _evict(self, victim: Candidate | RadixNode, num_pages: int | None) -> None:
        """Evict an expert, or `num_pages` pages of a leaf; None: as few as may empty a frame."""
        if isinstance(victim, RadixNode):
            self.evict_leaf(victim, num_pages or self._pool.last_run(victim.pages))
        else:
            self._table.evict(victim.layer, victim.expert)
            self.experts_evicted += 1
