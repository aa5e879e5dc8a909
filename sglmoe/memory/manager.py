"""The one owner of the arena: the only part of memory/ that the worker calls.

It decides who gets frames and pages and who loses them. It holds no tensor and moves no byte:
experts arrive through the callable it is given. Only the worker's main thread may call it.

Why nothing here can deadlock, or wait for something that does not come:

* At least `floor_frames` frames are always free or hold experts, one or packed ones: KV never takes
  more than the rest. Pins belong to the wave that runs, and there is one at most, so when a wave
  begins there is a frame to be had for at least one expert, even if a page of a running request sits
  in every other frame. The layer goes on with what fits and takes more waves.
* `extend` never waits. All pages that no running request holds can be evicted, one by one, wherever
  they lie, and a page of any KV frame is as good as any other; so it is known beforehand, from
  counts alone, whether enough pages can be freed. If not, it changes nothing and returns False; the
  caller then gives up another request or this one.
"""

import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Geometry, check_floor
from sglmoe.memory.expert_values import Probabilities
from sglmoe.memory.experts import ExpertIds
from sglmoe.memory.frame_sets import FrameSets
from sglmoe.memory.kv_pages import Pages, no_pages
from sglmoe.memory.link_gate import LoadExperts
from sglmoe.memory.memory_map import draw_memory
from sglmoe.memory.packed_order import NO_PACKING, Packing
from sglmoe.memory.prefetch import BackgroundLoader, Wanted
from sglmoe.memory.radix_cache import TOKEN_BYTES, RadixNode, path_pages
from sglmoe.memory.tenants import Tenants
from sglmoe.protocol import MemoryMap, MemorySnapshot
from sglmoe.units import ceil_div


@dataclass(slots=True)
class _Request:
    """The KV of a running request: pages of the tree up to `node`, which it has locked, then pages
    of its own."""

    node: RadixNode
    num_tree_pages: int
    pages: Pages
    hit_tokens: int  # this and the next: not counted yet
    prefill_tokens: int


@dataclass(slots=True)
class _Counters:
    """Running totals since the start; see `MemorySnapshot`."""

    cache_hit_tokens: int = 0
    prefill_tokens: int = 0
    ghost_hit_tokens: int = 0


class MemoryManager:
    """Frames, pages, prefixes and experts under one budget.

    `floor_frames` frames stay available to experts: at least 1 for a model that has any; ValueError
    if the arena has no frame more than that. `load_experts` brings experts in that a layer waits for,
    `background` what is prefetched; without it nothing is. `host_counters` gives the fields of
    `MemorySnapshot` on the tiers they come from.
    Tokens are passed as little-endian int32 bytes. With MemoryPolicy.STATIC experts have
    `expert_ratio` of the frames, each layer as many, and KV the rest. `packing` lets frames hold
    packed experts, with MemoryPolicy.COST_AWARE alone.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        num_layers: int,
        num_experts: int,
        floor_frames: int,
        load_experts: LoadExperts,
        policy: MemoryPolicy = MemoryPolicy.LRU,
        expert_ratio: float = 0.0,
        host_counters: Callable[[], Mapping[str, Any]] = dict,
        background: BackgroundLoader | None = None,
        packing: Packing = NO_PACKING,
    ):
        assert floor_frames >= (1 if num_experts else 0)
        assert not packing.expert_bytes or policy is MemoryPolicy.COST_AWARE
        layer_frames = 0
        if policy is MemoryPolicy.STATIC and num_experts:
            share = int(geometry.num_frames * expert_ratio) // num_layers
            layer_frames = min(max(share, floor_frames), num_experts)
            floor_frames = num_layers * layer_frames
        check_floor(geometry, floor_frames)
        tenants = Tenants(
            geometry,
            policy,
            (num_layers, num_experts),
            floor_frames=floor_frames,
            layer_frames=layer_frames,
            packing=packing,
        )
        tenants.load_with(load_experts, background)
        self.prices = tenants.prices
        self._clock, self._frames, self._reuse = tenants.clock, tenants.frames, tenants.reuse
        self._pool, self._leaves, self._cache = tenants.pool, tenants.leaves, tenants.cache
        self._table, self._experts, self._slabs = tenants.table, tenants.experts, tenants.slabs
        self._evictor, self._prefetches = tenants.evictor, tenants.prefetches
        self._pager, self._lender = tenants.pager, tenants.lender
        self.policy = policy
        self.expert_ratio = expert_ratio
        self._geometry = geometry
        self._max_kv_frames = geometry.num_frames - floor_frames
        self._host_counters = host_counters
        self._requests: dict[str, _Request] = {}
        self._counters = _Counters()
        self._page_offsets = np.arange(geometry.page_tokens, dtype=np.int32)

    @property
    def frame_table(self) -> npt.NDArray[np.int32]:
        """int32 `[num_layers, num_experts]`, -1 = absent; always the same memory."""
        return self._table.frame_table

    @property
    def expert_demand(self) -> npt.NDArray[np.float64]:
        """How much each expert is wanted in a frame; see `ExpertValues.demand`. For any thread."""
        return self._experts.values.demand()

    @property
    def is_packed(self) -> npt.NDArray[np.bool_]:
        """Which experts are packed in frames, `[num_layers, num_experts]`; not to be changed."""
        return self._slabs.is_packed

    # ------------------------------------------------------------------------------------------- KV

    def probe(self, tokens: bytes, namespace: str) -> int:
        """How many of these tokens are cached, in whole pages. Changes nothing."""
        return self._cache.match(tokens, namespace).num_tokens

    def admit(
        self, rid: str, tokens: bytes, namespace: str, *, max_cached_tokens: int | None = None
    ) -> int:
        """Start a request on its longest cached prefix; returns how many tokens that has.

        It has `max_cached_tokens` at most and never all: one must be computed for its logits.
        """
        assert rid not in self._requests, f"{rid} is admitted twice"
        num_tokens = len(tokens) // TOKEN_BYTES
        limit = num_tokens - 1
        if max_cached_tokens is not None:
            limit = min(limit, max_cached_tokens)
        tokens = tokens[: max(0, limit) * TOKEN_BYTES]
        match = self._cache.match(tokens, namespace)
        self._counters.ghost_hit_tokens += self._geometry.page_tokens * self._cache.recall(
            tokens, match.num_tokens * TOKEN_BYTES, namespace
        )
        node, newly_locked = self._cache.lock(match, namespace)
        self._pool.hold(newly_locked)
        self._requests[rid] = _Request(
            node=node,
            num_tree_pages=len(match.pages),
            pages=match.pages,
            hit_tokens=match.num_tokens,
            prefill_tokens=num_tokens - match.num_tokens,
        )
        return match.num_tokens

    def extend(self, rid: str, num_tokens: int) -> bool:
        """Make sure that the request has pages for `num_tokens` in all; False, and nothing changed,
        if there can't be."""
        request = self._requests[rid]
        num_missing = ceil_div(num_tokens, self._geometry.page_tokens) - len(request.pages)
        if num_missing <= 0:
            return True
        last_page = request.pages[-1] if request.pages else None
        if not self._evictor.make_pages(num_missing, after=last_page):
            return False
        request.pages += self._pool.allocate(num_missing, after=last_page)
        self._count_prefill(request)
        return True

    def has_pages(self, wanted: Iterable[tuple[str, int]]) -> bool:
        """Whether `extend` could give these requests so many tokens each, and no frame would change hands for it."""
        has = [(len(self._requests[rid].pages), num_tokens) for rid, num_tokens in wanted]
        missing = [max(0, ceil_div(num, self._geometry.page_tokens) - its) for its, num in has]
        return max(missing, default=0) <= 1 and sum(missing) <= self._pool.free_pages

    def pages(self, rid: str) -> list[int]:
        """The request's pages in the order of its tokens."""
        return self._requests[rid].pages.tolist()

    def token_id(self, rid: str, position: int) -> int:
        """The KV token id of one position."""
        page, offset = divmod(position, self._geometry.page_tokens)
        first_id = self._geometry.first_id
        return first_id + self._requests[rid].pages[page] * self._geometry.page_rows + offset

    def token_ids(self, rid: str, start: int, stop: int) -> npt.NDArray[np.int32]:
        """The KV token ids of positions [start, stop): int32 ``[stop - start]``."""
        page_tokens = self._geometry.page_tokens
        first_page = start // page_tokens
        pages = self._requests[rid].pages[first_page : ceil_div(stop, page_tokens)]
        first_ids = np.frombuffer(pages, np.int32) * self._geometry.page_rows
        first_ids += self._geometry.first_id
        ids = (first_ids[:, np.newaxis] + self._page_offsets).ravel()
        return ids[start - first_page * page_tokens : stop - first_page * page_tokens]

    def commit(self, rid: str, tokens: bytes, num_computed: int) -> bool:
        """Share the full pages among the first `num_computed` tokens; True if the pages of any of
        these have changed.

        Pages change where another request has committed the same tokens before: then both use the
        other's.
        """
        request = self._requests[rid]
        start, stop = request.num_tree_pages, num_computed // self._geometry.page_tokens
        if stop <= start:
            return False
        page_bytes = self._geometry.page_tokens * TOKEN_BYTES
        inserted = self._cache.insert(
            request.node, tokens[start * page_bytes : stop * page_bytes], request.pages[start:stop]
        )
        request.node, request.num_tree_pages = inserted.node, stop
        if not inserted.known_pages:
            return False
        self._pool.hold(inserted.newly_locked)
        known = slice(start, start + len(inserted.known_pages))
        self._free_private(request.pages[known])
        request.pages[known] = inserted.known_pages
        return True

    def release(self, rid: str, tokens: bytes, num_computed: int) -> None:
        """Forget a request that has finished, was aborted or is preempted; what it computed stays
        cached."""
        self.commit(rid, tokens, num_computed)
        request = self._requests.pop(rid)
        self._clock.tick()
        self._pool.unhold(self._cache.unlock(request.node))
        self._free_private(request.pages[request.num_tree_pages :])

    def set_prices(self, *, expert_nanoseconds: int, token_nanoseconds: int) -> None:
        """What it takes to load an expert and to prefill a token, from now on."""
        self.prices.set(expert_nanoseconds=expert_nanoseconds, token_nanoseconds=token_nanoseconds)

    def flush_cache(self) -> None:
        """Forget all prefixes that no running request uses."""
        while (leaf := self._leaves.first()) is not None:
            self._evictor.evict_leaf(leaf, len(leaf.pages))

    def clear(self) -> None:
        """Forget all prefixes that no running request uses, all experts, and what was learned of
        both: between two steps."""
        self.flush_cache()
        self._cache.forget()
        self._reuse.clear()
        self._pager.settle()
        self._prefetches.drop_all()
        for layer, expert in np.argwhere(self._table.evictable()).tolist():
            self._table.evict(layer, expert)
        self._slabs.give_all_back()
        self._experts.clear()

    # -------------------------------------------------------------------------------------- experts

    def begin_step(self, num_tokens: int = 1) -> None:
        """The layers to come are those of another forward pass, over so many tokens."""
        self._pager.begin_step(num_tokens)
        self._prefetches.begin_step()
        self._reuse.begin_step()
        self._experts.begin_step()

    def waves(
        self, layer: int, experts: Sequence[int] | ExpertIds
    ) -> Generator[ExpertIds, None, None]:
        """Groups of these distinct experts, resident and pinned until the next one is asked for.

        Residents come first, then as many others as there are frames for; together, if these need
        not be waited for. With enough frames that is all. Leaving early, by `close` or by an
        exception, unpins too, at the latest when the next layer or step begins.
        """
        return self._pager.waves(layer, np.asarray(experts, np.intp))

    def expect(self, layer: int, probabilities: Probabilities) -> None:
        """How likely each expert is to be used in the layers after `layer`, or after the last one in
        the next step: `[num_layers, num_experts]`. What they are worth takes that into account."""
        self._experts.expect(layer, probabilities)

    def prefetch(self, wanted: Iterable[Wanted], limit: int = sys.maxsize) -> int:
        """Begin to bring in those, in this order and at most so many, that are absent and worth more
        than what gives way; how many. They arrive while layers compute, or are given up when their
        layer is over."""
        return self._prefetches.begin(wanted, limit)

    def pause_streaming(self, is_paused: bool) -> None:
        """Expect nothing and begin nothing but what `expect` and `prefetch` say; see `LayerStreaming`."""
        if self._pager.streaming is not None:
            self._pager.streaming.is_paused = is_paused

    def pack(self, num_frames: int, experts: Sequence[tuple[int, int]]) -> None:
        """From now on have these experts packed, the most wanted first, as far as `num_frames` frames hold
        them: between two steps. Each is kept when a load brings its packed bytes.

        Experts in frames give theirs up for that, prefixes never do; whoever is worth more takes them back.
        """
        self._pager.settle()
        self._evictor.fit_packed(min(num_frames, self._max_kv_frames - self._frames.num_kv))
        self._slabs.hold(experts)

    def lend(self, least: int, num_ahead: int = 0) -> FrameSets | None:
        """Frames for a step without the host, which may replace experts within each layer's set. Until `take_back` nothing
        else may be asked of memory but `expect` and `prefetch`, for which up to `num_ahead` frames stay free. None, and nobody
        evicted, if a layer can't have `least`, or one for each expert."""
        return self._lender.lend(least, num_ahead)

    def take_back(self, sets: FrameSets, *, goes_on: bool = False) -> None:
        """What the step has made of them: who is in each place, USED where it used that, and prefetches that came meanwhile
        in further places, behind those that were lent. Unchanged, nothing has happened. With `goes_on` the next step works
        with the sets as they are, and they stay lent: `extend`, too, may be asked for what `has_pages` grants."""
        self._lender.take_back(sets, goes_on=goes_on)

    @property
    def num_on_their_way(self) -> int:
        """Prefetches that were begun and have not ended."""
        return self._prefetches.num_on_their_way

    # ---------------------------------------------------------------------------------- state, laws

    def snapshot(self, step_id: int) -> MemorySnapshot:
        """What the scheduler gets to see after a step."""
        geometry, counters, pager = self._geometry, self._counters, self._pager
        evictor, prefetches = self._evictor, self._prefetches.counters
        return MemorySnapshot(
            step_id=step_id,
            num_frames=geometry.num_frames,
            frame_bytes=geometry.frame_bytes,
            free_frames=self._frames.num_empty,
            expert_frames=self._frames.num_expert,
            kv_frames=self._frames.num_kv,
            total_pages=self._max_kv_frames * geometry.pages_per_frame,
            locked_pages=self._pool.held_pages,
            cached_pages=self._pool.idle_pages,
            free_pages=self._pool.free_pages,
            page_tokens=geometry.page_tokens,
            packed_frames=self._frames.num_packed,
            packed_experts=int(np.count_nonzero(self._slabs.is_packed)),
            packed_hits=self._slabs.hits,
            packed_kept=self._slabs.kept,
            expert_bytes_moved=(pager.misses - prefetches.late + prefetches.landed)
            * geometry.expert_bytes,
            experts_evicted=evictor.experts_evicted,
            pages_evicted=evictor.pages_evicted,
            cache_hit_tokens=counters.cache_hit_tokens,
            prefill_tokens=counters.prefill_tokens,
            ghost_hit_tokens=counters.ghost_hit_tokens,
            prefetches_begun=prefetches.begun,
            prefetches_used=prefetches.used,
            prefetches_late=prefetches.late,
            prefetches_wasted=prefetches.dropped + self._table.num_unused_evicted,
            **pager.counters(),
            **self._host_counters(),
        )

    def draw(self, is_in_host: npt.NDArray[np.bool_]) -> MemoryMap:
        """Who is where, for people to look at; `is_in_host` as of `HostTier.held`."""
        parts = self._frames, self._pool, self._table, self._slabs, self.expert_demand
        return draw_memory(*parts, policy=self.policy, is_in_host=is_in_host)

    def violations(self) -> list[str]:
        """Each conservation law of the arena that does not hold, in words; recomputed from scratch."""
        held, idle = no_pages(), no_pages()
        for node in self._cache.nodes():
            (held if node.locks else idle).extend(node.pages)
        found = []
        for rid, request in self._requests.items():
            held.extend(request.pages[request.num_tree_pages :])
            if request.pages[: request.num_tree_pages] != path_pages(request.node):
                found.append(f"the shared pages of {rid} are not those of its path in the tree")
            num_tokens = len(request.pages) * self._geometry.page_tokens
            if np.any(self.token_ids(rid, 0, num_tokens) < self._geometry.first_id):
                found.append(f"{rid} has KV ids that are for rows that pad a batch")
        return [
            *found,
            *self._frames.violations(),
            *self._pool.violations(held=held, idle=idle),
            *self._cache.violations(request.node for request in self._requests.values()),
            *self._table.violations(),
            *self._slabs.violations(),
        ]

    def _free_private(self, pages: Pages) -> None:
        self._pool.unhold(pages)
        self._pool.free(pages)

    def _count_prefill(self, request: _Request) -> None:
        """Count when the request has got pages, and once: one that was admitted in vain comes again."""
        self._counters.cache_hit_tokens += request.hit_tokens
        self._counters.prefill_tokens += request.prefill_tokens
        request.hit_tokens = request.prefill_tokens = 0
