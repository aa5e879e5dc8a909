"""Makes room: who gives way for new pages and for experts, by the value of what they hold.

Running requests' KV and pinned experts never do.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Frames
from sglmoe.memory.eviction import LeafOrder
from sglmoe.memory.expert_order import Candidate, ExpertOrder
from sglmoe.memory.experts import ExpertTable
from sglmoe.memory.frame_reclaim import LEAVES_AHEAD, Tail, plan_emptying, plan_near
from sglmoe.memory.kv_pages import PagePool
from sglmoe.memory.packed_order import PackedOrder
from sglmoe.memory.packed_slabs import PackedSlabs
from sglmoe.memory.radix_cache import RadixCache, RadixNode


class Victim(NamedTuple):
    """The least valuable frame of experts, ready or packed, and how it becomes free."""

    value: float
    evict: Callable[[], object]
    is_packed: bool


class Evictor:
    """Compares the least valuable experts, ready and packed, with the least valuable prefix, and evicts.

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
        slabs: PackedSlabs,
        packed: PackedOrder,
        layer_frames: int,
        pages_per_frame: int,
        drop_prefetch: Callable[[], bool],
    ):
        self._is_static = policy is MemoryPolicy.STATIC
        self._frames = frames
        self._pool = pool
        self._cache = cache
        self._leaves = leaves
        self._table = table
        self._experts = experts
        self._slabs = slabs
        self._packed = packed
        self._layer_frames = layer_frames
        self._pages_per_frame = pages_per_frame
        self._drop_prefetch = drop_prefetch
        self.experts_evicted = 0  # totals since the start: these two
        self.pages_evicted = 0

    def make_pages(self, num_pages: int, *, after: int | None) -> bool:
        """Evict until the pool has `num_pages` to hand out, near page `after` if it can choose; False,
        and nothing evicted, if it never can."""
        num_pinned = len(self._table.pinned) + self._table.num_awaited + self._slabs.num_used_frames
        if num_pages > self._pool.most_pages(len(self._frames) - num_pinned):
            return False
        while (num_missing := num_pages - self._pool.available_pages) > 0:
            victim = self._next_victim() if self._pool.may_grow else None
            leaf = self._leaves.first()
            if leaf is not None and self._goes_before(leaf, victim):
                self._evict_near(leaf, num_missing, after, below=_value(victim))
            elif victim is not None:
                victim.evict()
            else:
                found = self._drop_prefetch() or self.evict_packed()
                assert found, f"{num_missing} pages are neither free nor evictable"
        return True

    def make_frame(self, layer: int) -> bool:
        """Evict until a frame is free for an expert of this layer; False if only pinned experts and
        pages of running requests are left, or but for these packed experts alone, and the layer has
        something to go on with."""
        if self._is_static:
            return self._make_frame_within(layer) or (
                self._drop_prefetch() and self.make_frame(layer)
            )
        while not self._frames.num_free:
            victim = self._next_victim(layer)
            if self._evict_prefix_before(victim):
                continue
            if victim is not None:
                victim.evict()
            elif not self._drop_prefetch():
                return False
        return True

    def make_way(self) -> bool:
        """Evict what is worth less than every expert in a frame: a prefix, as far as may empty a frame, or a frame of
        packed ones. False if nothing is."""
        if not self._pool.idle_frames and not self._slabs.num_frames:
            return False
        victim = self._next_victim()
        if self._evict_prefix_before(victim):
            return True
        if victim is None or not victim.is_packed:
            return False
        victim.evict()
        return True

    def shrink(self, layer: int, num_frames: int) -> None:
        """Evict the least valuable of a layer's residents but for so many."""
        num_victims = self._table.num_resident[layer] - num_frames
        for expert in self._experts.first_few_of(layer, num_victims):
            self._evict_expert(expert)

    def make_spare_frame(self, layer: int, value: float) -> bool:
        """The same for an expert of that value which is only likely to be used: False unless a frame
        is free or an expert in one is worth less. A guess costs nobody a prefix, or a packed expert."""
        if self._is_static:
            return self._make_frame_within(layer, value)
        if self._frames.num_free:
            return True
        expert = self._experts.first()
        if expert is None or expert.value >= value:
            return False
        self._evict_expert(expert)
        return True

    def evict_leaf(self, leaf: RadixNode, num_pages: int) -> None:
        """Forget the last `num_pages` pages of an unlocked leaf."""
        pages = self._cache.evict(leaf, num_pages)
        self._pool.free(pages)
        self.pages_evicted += len(pages)

    def fit_packed(self, num_frames: int) -> None:
        """Have so many frames for packed experts, or as many as experts in frames leave."""
        while self._slabs.num_frames > num_frames and self.evict_packed():
            pass
        while self._slabs.num_frames < num_frames and self.make_spare_frame(0, math.inf):
            self._slabs.grow()

    def evict_packed(self) -> bool:
        """Give the next frame of packed experts back; False if there is none."""
        packed = self._packed.first()
        if packed is None:
            return False
        self._slabs.give_back(packed.place)
        return True

    def _make_frame_within(self, layer: int, value: float = math.inf) -> bool:
        """Keep the layer within its share."""
        table = self._table
        if table.num_resident[layer] + table.num_loading[layer] < self._layer_frames:
            return True
        expert = self._experts.first_of(layer)
        if expert is None or expert.value >= value:
            return False
        self._evict_expert(expert)
        return True

    def _next_victim(self, layer: int | None = None) -> Victim | None:
        """Of all but those that have a share of their own: they never give way to KV. For a layer that can go on, no
        packed one where no expert could go instead."""
        if self._is_static:
            return None
        expert, packed = self._experts.first(), self._packed.first()
        bound = math.inf if expert is None else expert.value
        if packed is not None and packed.value < bound:
            if expert is None and layer is not None and self._goes_on(layer):
                return None
            value = packed.value if packed.value > -math.inf else bound  # in the expert's stead
            return Victim(value, self.evict_packed, is_packed=True)
        if expert is None:
            return None
        return Victim(expert.value, lambda: self._evict_expert(expert), is_packed=False)

    def _goes_on(self, layer: int) -> bool:
        """Whether the layer has experts for a wave already; the others can take another one."""
        return bool(self._table.num_loading[layer] or len(self._table.pinned))

    def _goes_before(self, leaf: RadixNode, victim: Victim | None) -> bool:
        return self._leaves.value(leaf) < _value(victim)

    def _evict_expert(self, expert: Candidate) -> None:
        self._table.evict(expert.layer, expert.expert)
        self.experts_evicted += 1

    def _evict_near(
        self, leaf: RadixNode, num_pages: int, page: int | None, *, below: float
    ) -> None:
        """Evict at most `num_pages` pages of the leaf whose turn it is, or of one of the next that
        ends in that page's frame."""
        frame = -1 if page is None else page // self._pages_per_frame
        if page is None or not self._pool.num_idle(frame):
            self.evict_leaf(leaf, num_pages)
            return
        leaves = self._next_leaves(below)
        pages = [leaf.pages for leaf in leaves]
        near = plan_near(pages, num_pages, frame=frame, pages_per_frame=self._pages_per_frame)
        self._evict_tails(leaves, near)

    def _evict_prefix_before(self, victim: Victim | None) -> bool:
        """As much of prefixes as may empty a frame, if the next one is worth less; False, and nothing, if not."""
        # With a running request in every KV frame, evicting prefixes would free none.
        leaf = self._leaves.first() if self._pool.idle_frames else None
        if leaf is None or not self._goes_before(leaf, victim):
            return False
        self._empty_frame(below=_value(victim))
        return True

    def _empty_frame(self, *, below: float) -> None:
        """Evict as few pages as may empty a frame, of the leaves that are next."""
        leaves = self._next_leaves(below)
        emptying = plan_emptying(
            [leaf.pages for leaf in leaves],
            pages_per_frame=self._pages_per_frame,
            num_to_empty=self._pool.num_to_empty,
        )
        self._evict_tails(leaves, emptying)

    def _next_leaves(self, below: float) -> list[RadixNode]:
        """The next few of less value than that; the first is among them."""
        leaves = self._leaves.first_few(LEAVES_AHEAD if self._pages_per_frame > 1 else 1)
        return [leaf for leaf in leaves if self._leaves.value(leaf) < below]

    def _evict_tails(self, leaves: Sequence[RadixNode], tails: Sequence[Tail]) -> None:
        for tail in tails:
            self.evict_leaf(leaves[tail.leaf], tail.num_pages)


def _value(victim: Victim | None) -> float:
    """What a leaf must be worth less than, to go first."""
    return math.inf if victim is None else victim.value
