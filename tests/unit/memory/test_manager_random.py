"""Random steps against a real arena: whoever reads finds what he wrote, and the laws always hold.

The arena is an array of ints. A token's KV depends on all tokens before it, so it is a checksum of
these here; an expert's frame is full of its number. So a page or frame that has two users, or that
is handed on too early, shows as wrong contents, whatever the counters say. Experts come through
host memory, which fills meanwhile, from a disk that may fail; those prefetched arrive when the
machine says so, and until then their frames are full of anything. Packed, an expert is its number
too, in fewer bytes, wherever in the arena its cell is.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)
from step_without_host import Step, run_step, sets_behind

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Geometry
from sglmoe.memory.experts import ABSENT, ExpertIds, Load
from sglmoe.memory.frame_sets import USED, FrameSets
from sglmoe.memory.host_tier import HostTier, TieredStore
from sglmoe.memory.link_gate import Finish, LinkGate
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.packed_order import Packing
from sglmoe.memory.prefetch import Arrival, Wanted
from sglmoe.memory.promoter import Promoter
from sglmoe.memory.store import Bytes, ExpertReadError, ExpertStore
from sglmoe.protocol import MemorySnapshot

NUM_LAYERS, NUM_EXPERTS = 2, 4
PAGE_TOKENS = 4
PAGE_ROWS = 2 * 3 * PAGE_TOKENS
PADDING_PAGES = (
    2  # not in `arena` below: what is written there by no request's id is not seen by any
)

ALL_EXPERTS = [(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]

# Beginnings of four texts that diverge within a page, at its end, and at once.
TEXTS = ([1] * 28, [1] * 10 + [2] * 18, [1] * 16 + [2] * 12, [2] * 28)
PROMPTS = st.builds(
    lambda text, num_tokens: text[:num_tokens], st.sampled_from(TEXTS), st.integers(1, 28)
)
NAMESPACES = st.sampled_from(["", "", "other"])
ROUTED = st.lists(
    st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1), min_size=NUM_LAYERS, max_size=NUM_LAYERS
)
STEPS = st.lists(ROUTED, min_size=1, max_size=3)  # without the host


def expert_number(layer: int, expert: int) -> int:
    return -1 - layer * NUM_EXPERTS - expert


class Disk(ExpertStore):
    """All experts, each full of its number. When it fails, half of one has been read."""

    def __init__(self, expert_bytes: int) -> None:
        super().__init__()
        self.fails = False
        for layer, expert in ALL_EXPERTS:
            cells = np.full(expert_bytes // 4, expert_number(layer, expert), np.int32)
            whole, half = cells.view(np.uint8), expert_bytes // 2
            for part, array in (
                ("w1", whole[:half]),
                ("w3", whole[half:-4]),
                ("w2", whole[-4:]),
            ):
                self.put(layer, expert, part, array)

    def read(
        self,
        layer: int,
        expert: int,
        target: Bytes,
        *,
        before_chunk: Callable[[], None] | None = None,
    ) -> int:
        if self.fails:
            target[: len(target) // 2] = 77
            raise ExpertReadError("the disk is gone")
        return super().read(layer, expert, target, before_chunk=before_chunk)


class Background:
    """Prefetches that arrive one by one; a frame on its way is full of anything."""

    def __init__(self, arena: np.ndarray, read: Callable[[Load], None]):
        self.under_way: list[Load] = []
        self.ended: list[Arrival] = []
        self.promoted: dict[Load, bool | None] = {}  # None: they have not ended
        self._arena = arena
        self._read = read

    def begin(self, load: Load) -> None:
        self._arena[load.frame] = 99
        self.under_way.append(load)

    def arrive(self) -> None:
        load = self.under_way.pop(0)
        self.ended.append(Arrival(load, self._try_read(load)))

    def finished(self) -> list[Arrival]:
        ended, self.ended = self.ended, []
        return ended

    def promote(self, load: Load) -> None:
        for arrival in self.ended:
            if arrival.load == load:
                self.ended.remove(arrival)
                self.promoted[load] = arrival.is_there
                return
        self.under_way.remove(load)
        self.promoted[load] = None

    def wait(self, load: Load) -> bool:
        is_there = self.promoted.pop(load)
        return self._try_read(load) if is_there is None else is_there

    def cancel(self, load: Load) -> None:
        self.ended = [arrival for arrival in self.ended if arrival.load != load]
        self.under_way = [its for its in self.under_way if its != load]
        self._arena[load.frame] = 98

    def _try_read(self, load: Load) -> bool:
        try:
            self._read(load)
        except ExpertReadError:
            return False
        return True


class Request:
    """What a running request should find."""

    def __init__(self, tokens: list[int], namespace: str, num_cached: int):
        self.tokens = tokens
        self.namespace = namespace
        self.num_computed = num_cached

    @property
    def token_bytes(self) -> bytes:
        return np.array(self.tokens, np.int32).tobytes()

    def kv(self, start: int, stop: int) -> list[int]:
        """What the model makes of these positions."""
        seed = zlib.crc32(self.namespace.encode())
        return [
            zlib.crc32(self.token_bytes[: 4 * (at + 1)], seed) >> 1 for at in range(start, stop)
        ]


class MemoryMachine(RuleBasedStateMachine):
    """The worker, with an arena that remembers."""

    rids = Bundle("rids")

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[str, Request] = {}
        self.num_admitted = 0
        self.wave: Generator[ExpertIds, None, None] | None = None
        self.slow_loads = False

    @initialize(
        num_frames=st.integers(2, 12),
        pages_per_frame=st.sampled_from([1, 2, 3, 6]),
        floor_frames=st.integers(1, 6),
        policy=st.sampled_from(MemoryPolicy),
        layer_frames=st.integers(1, 3),
        num_blocks=st.sampled_from([0, 2, 8]),
        packed_ratio=st.sampled_from([0.0, 0.5, 0.7, 1.0]),
        share=st.sampled_from([None, None, 0.25, 0.6]),
    )
    def build(
        self,
        num_frames: int,
        pages_per_frame: int,
        floor_frames: int,
        policy: MemoryPolicy,
        layer_frames: int,
        num_blocks: int,
        packed_ratio: float,
        share: float | None,
    ) -> None:
        self.pages_per_frame = pages_per_frame
        if policy is MemoryPolicy.STATIC:
            num_frames = max(num_frames, NUM_LAYERS * layer_frames + 1)
            floor_frames = 1
        floor_frames = self.floor_frames = min(floor_frames, num_frames - 1)
        self.static_frames = layer_frames if policy is MemoryPolicy.STATIC else None
        reserved = NUM_LAYERS * layer_frames if self.static_frames else floor_frames
        self.capacity_pages = (num_frames - reserved) * pages_per_frame
        self.arena = np.zeros((num_frames, pages_per_frame * PAGE_TOKENS), np.int32)
        geometry = Geometry(
            num_frames=num_frames,
            frame_bytes=16 * pages_per_frame,
            expert_bytes=16 * pages_per_frame,
            page_bytes=16,
            page_tokens=PAGE_TOKENS,
            pages_per_frame=pages_per_frame,
            page_rows=PAGE_ROWS,
            padding_pages=PADDING_PAGES,
        )
        self.disk = Disk(geometry.expert_bytes)
        blocks = np.zeros((num_blocks, geometry.expert_bytes), np.uint8)
        self.tier = HostTier(blocks, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS)
        self.tiered = TieredStore(self.tier, self.disk)
        self.background = Background(self.arena, self.read)
        self.can_pack = policy is MemoryPolicy.COST_AWARE and packed_ratio > 0
        self.packed_cells = -(-int(packed_ratio * geometry.frame_bytes) // 4)
        self.decode_ratio = 0.1
        self.memory = MemoryManager(
            geometry,
            num_layers=NUM_LAYERS,
            num_experts=NUM_EXPERTS,
            floor_frames=floor_frames,
            load_experts=self.load,
            policy=policy,
            expert_ratio=(NUM_LAYERS * layer_frames + 0.5) / num_frames,
            host_counters=self.tier.counters,
            background=self.background,
            packing=Packing(
                4 * self.packed_cells if self.can_pack else 0, lambda: self.decode_ratio, share
            ),
        )
        self.promoter = Promoter(
            self.tier,
            self.disk,
            LinkGate(),
            heat=lambda: self.memory.expert_demand,
            residents=lambda: self.memory.frame_table >= 0,
        )

    def load(self, loads: Sequence[Load]) -> Finish | None:
        assert loads
        if not self.slow_loads:
            self.read_all(loads)
            return None
        for load in loads:
            self.arena[load.frame] = 97
        return lambda: self.read_all(loads)

    def read_all(self, loads: Sequence[Load]) -> float:
        for load in loads:
            if load.cell is not None and load.cell.is_filled:
                self.decode(load)
            else:
                self.read(load)
                self.keep(load)
        return 0.0

    def packed_cell(self, load: Load) -> list[np.ndarray]:
        assert load.cell is not None
        cells = self.arena.reshape(-1)
        runs = [cells[start // 4 : stop // 4] for start, stop in load.cell.runs]
        assert sum(len(run) for run in runs) == self.packed_cells
        return runs

    def decode(self, load: Load) -> None:
        number = expert_number(load.layer, load.expert)
        assert all((run == number).all() for run in self.packed_cell(load))
        self.arena[load.frame] = number

    def keep(self, load: Load) -> None:
        if load.cell is not None:
            for run in self.packed_cell(load):
                run[:] = expert_number(load.layer, load.expert)

    def read(self, load: Load) -> None:
        self.tiered.read(load.layer, load.expert, self.arena[load.frame].view(np.uint8))

    def cells(self, rid: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in the arena the tokens of these positions are."""
        ids = self.memory.token_ids(rid, start, stop)
        assert ids.tolist() == [self.memory.token_id(rid, at) for at in range(start, stop)]
        pages, offsets = np.divmod(ids, PAGE_ROWS)
        pages -= PADDING_PAGES
        assert (pages >= 0).all()
        frames, pages = np.divmod(pages, self.pages_per_frame)
        assert (offsets < PAGE_TOKENS).all()
        return frames, pages * PAGE_TOKENS + offsets

    # ------------------------------------------------------------------------------------ requests

    @rule(target=rids, prompt=PROMPTS, namespace=NAMESPACES, limit=st.none() | st.integers(0, 40))
    def admit(self, prompt: list[int], namespace: str, limit: int | None) -> str:
        rid = f"r{self.num_admitted}"
        self.num_admitted += 1
        request = Request(prompt, namespace, 0)
        known = self.memory.probe(request.token_bytes, namespace)
        num_cached = self.memory.admit(rid, request.token_bytes, namespace, max_cached_tokens=limit)
        most = min(known, len(prompt) - 1, 40 if limit is None else limit)
        assert num_cached == most // PAGE_TOKENS * PAGE_TOKENS
        request.num_computed = num_cached
        self.requests[rid] = request
        return rid

    @rule(rid=rids, num_tokens=st.integers(1, 40))
    def compute(self, rid: str, num_tokens: int) -> None:
        """A chunk of a prefill, or one decoded token."""
        request = self.requests[rid]
        start = request.num_computed
        if start == len(request.tokens):
            request.tokens.append(3)
        stop = min(start + num_tokens, len(request.tokens))
        before = self.memory.pages(rid)
        snapshot = self.memory.snapshot(0)
        if not self.memory.extend(rid, stop):
            assert self.memory.snapshot(0) == snapshot
            assert self.memory.pages(rid) == before
            missing = -(-stop // PAGE_TOKENS) - len(before)
            assert missing > self.capacity_pages - snapshot.locked_pages or self.wave is not None
            return
        assert self.memory.pages(rid)[: len(before)] == before
        self.arena[self.cells(rid, start, stop)] = request.kv(start, stop)
        request.num_computed = stop

    @rule(prompt=PROMPTS, namespace=NAMESPACES)
    def serve(self, prompt: list[int], namespace: str) -> None:
        """A request from its start to its end."""
        rid = self.admit(prompt, namespace, None)
        self.compute(rid, len(prompt))
        self.commit(rid)
        self.release(rid)

    @rule(rid=rids)
    def commit(self, rid: str) -> None:
        request = self.requests[rid]
        before = self.memory.pages(rid)
        changed = self.memory.commit(rid, request.token_bytes, request.num_computed)
        assert changed == (self.memory.pages(rid) != before)
        full = request.num_computed // PAGE_TOKENS * PAGE_TOKENS
        assert self.memory.probe(request.token_bytes[: full * 4], request.namespace) == full

    @rule(rid=consumes(rids))
    def release(self, rid: str) -> None:
        request = self.requests.pop(rid)
        self.memory.release(rid, request.token_bytes, request.num_computed)
        full = request.num_computed // PAGE_TOKENS * PAGE_TOKENS
        assert self.memory.probe(request.token_bytes[: full * 4], request.namespace) == full

    @rule(expert=st.integers(1, 10**6), token=st.integers(1, 10**6))
    def set_prices(self, expert: int, token: int) -> None:
        self.memory.set_prices(expert_nanoseconds=expert, token_nanoseconds=token)

    @rule(num_steps=st.sampled_from([1, 1, 1, 100]), num_tokens=st.sampled_from([1, 1000]))
    def begin_steps(self, num_steps: int, num_tokens: int) -> None:
        for _ in range(num_steps):
            self.memory.begin_step(num_tokens)

    @precondition(lambda self: self.num_admitted % 8 == 7)  # not all the time
    @rule()
    def flush(self) -> None:
        self.memory.flush_cache()
        assert self.memory.snapshot(0).cached_pages == 0

    # --------------------------------------------------------------------------------------- waves

    @rule(
        layer=st.integers(0, NUM_LAYERS - 1),
        experts=st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True),
    )
    def run_layer(self, layer: int, experts: list[int]) -> None:
        self.wave = None
        row = self.memory.frame_table[layer]
        residents = {expert for expert in experts if row[expert] >= 0}
        seen: list[int] = []
        for number, wave in enumerate(self.memory.waves(layer, experts)):
            assert number or residents <= set(wave.tolist())
            self.check_wave(layer, wave)
            seen.extend(wave.tolist())
        assert sorted(seen) == sorted(experts)
        if self.static_frames is not None:
            residents_by_layer = (self.memory.frame_table >= 0).sum(axis=1)
            assert (residents_by_layer <= self.static_frames).all()

    @precondition(lambda self: self.num_admitted % 4 == 3)
    @rule(
        layer=st.integers(0, NUM_LAYERS - 1),
        experts=st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True),
    )
    def leave_layer(self, layer: int, experts: list[int]) -> None:
        """The caller fails in the middle of a layer, and something keeps its generator."""
        self.wave = self.memory.waves(layer, experts)
        self.check_wave(layer, next(self.wave))

    @precondition(lambda self: self.wave is not None)
    @rule()
    def close_layer(self) -> None:
        assert self.wave is not None
        self.wave.close()
        self.wave = None

    @precondition(lambda self: self.num_admitted % 4 == 2)
    @rule(
        layer=st.integers(0, NUM_LAYERS - 1),
        experts=st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True),
    )
    def run_layer_without_disk(self, layer: int, experts: list[int]) -> None:
        """It succeeds, if all are in frames or in host memory, or fails and leaves nothing half done."""
        self.wave = None
        self.disk.fails = True
        try:
            for wave in self.memory.waves(layer, experts):
                self.check_wave(layer, wave)
        except ExpertReadError:
            assert not all(self.tier.holds(layer, expert) for expert in experts)
        self.disk.fails = False

    # ----------------------------------------------------------------------- steps without the host

    @rule(least=st.integers(1, NUM_EXPERTS + 1), steps=STEPS, rid=rids)
    def decode_without_host(self, least: int, steps: list[list[set[int]]], rid: str) -> None:
        self.run_steps_without_host(least, steps, grown=rid)

    @rule(least=st.integers(1, NUM_EXPERTS + 1), steps=STEPS)
    def run_steps_without_host(
        self, least: int, steps: list[list[set[int]]], grown: str | None = None
    ) -> None:
        """Nothing is evicted for layers that can't have `least` frames each; with so many, as many experts are served. Each
        step but the first begins before memory hears of the one in front of it, and a request gets a page if one is at hand."""
        self.wave = None
        before, counted = self.memory.frame_table.copy(), self.memory.snapshot(0)
        sets = self.memory.lend(least)
        least = min(least, NUM_EXPERTS)
        if sets is None:
            assert (self.memory.frame_table[before >= 0] >= 0).all()
            assert not self.can_have(least, counted)
            assert self.floor_frames < NUM_LAYERS * least or counted.packed_frames
            return
        assert self.memory.violations() == []
        self.check_sets(sets, least)
        assert sets.expert_keys is not None
        outcome = run_step(sets, steps[0])
        for following in [*steps[1:], None]:
            known = outcome
            if following is not None:
                if grown is not None:
                    self.grow_by_one(grown)
                outcome = run_step(sets_behind(known, sets.expert_keys), following)
            self.take_back(known, goes_on=following is not None)

    def take_back(self, step: Step, *, goes_on: bool) -> None:
        counted = self.memory.snapshot(0)
        for layer, expert, frame in step.page_ins:
            self.arena[frame] = expert_number(layer, expert)
        self.memory.take_back(step.sets, goes_on=goes_on)
        assert self.memory.violations() == []
        now = self.memory.snapshot(0)
        is_place = np.arange(NUM_EXPERTS) < step.sets.sizes[:, np.newaxis]
        num_used = np.count_nonzero(is_place & (step.sets.keys == USED))
        assert now.expert_misses - counted.expert_misses == len(step.page_ins)
        assert now.expert_hits - counted.expert_hits == num_used - len(step.page_ins)
        if goes_on:
            self.memory.begin_step()

    def grow_by_one(self, rid: str) -> None:
        """As a request does whose next step begins while memory is lent; if there is a page at hand, it gets that."""
        request = self.requests[rid]
        num_tokens = request.num_computed + 1
        if request.num_computed < len(request.tokens):
            return  # it does not decode
        kinds = self.memory.draw(self.tier.held()).frames
        may_grow = self.memory.has_pages([(rid, num_tokens)])
        is_missing = num_tokens > PAGE_TOKENS * len(self.memory.pages(rid))
        assert may_grow == (not is_missing or self.memory.snapshot(0).free_pages > 0)
        if may_grow:
            assert self.memory.extend(rid, num_tokens)
            request.tokens.append(3)
            self.arena[self.cells(rid, num_tokens - 1, num_tokens)] = request.kv(
                num_tokens - 1, num_tokens
            )
            request.num_computed = num_tokens
        assert self.memory.draw(self.tier.held()).frames == kinds

    def can_have(self, least: int, now: MemorySnapshot) -> bool:
        if self.static_frames is not None:
            return least <= self.static_frames - self.memory.num_on_their_way
        return NUM_LAYERS * least <= now.free_frames + now.expert_frames

    def check_sets(self, sets: FrameSets, least: int) -> None:
        """Residents are in their frames, and no other frame is lent than free ones."""
        free = []
        for layer, size in enumerate(sets.sizes.tolist()):
            assert least <= size <= (self.static_frames or NUM_EXPERTS)
            residents = self.memory.frame_table[layer]
            owned = dict(zip(sets.owners[layer, :size], sets.frames[layer, :size], strict=True))
            owned.pop(ABSENT, None)
            assert owned == {e: frame for e, frame in enumerate(residents) if frame != ABSENT}
            assert (sets.keys < USED).all()
            free += sets.frames[layer, len(owned) : size].tolist()
        assert len(set(free)) == len(free)
        drawn = self.memory.draw(self.tier.held()).frames
        assert all(drawn[frame] == "." for frame in free)

    @rule(slow=st.booleans())
    def change_speed(self, slow: bool) -> None:
        """Whether residents run before the others are there."""
        self.slow_loads = slow

    # -------------------------------------------------------------------------- prefetches, host memory

    @rule(
        layer=st.integers(-1, NUM_LAYERS - 1),
        likely=st.lists(st.sampled_from(ALL_EXPERTS), unique=True),
        wanted=st.lists(st.sampled_from(ALL_EXPERTS), unique=True),
    )
    def prefetch(
        self, layer: int, likely: list[tuple[int, int]], wanted: list[tuple[int, int]]
    ) -> None:
        """Predictions may say anything, and not what is wanted."""
        probabilities = np.zeros((NUM_LAYERS, NUM_EXPERTS))
        for key in likely:
            probabilities[key] = 0.9
        self.memory.expect(layer, probabilities)
        before = len(self.background.under_way)
        num_begun = self.memory.prefetch(Wanted(*key, 0.9) for key in wanted)
        assert len(self.background.under_way) == before + num_begun

    @precondition(lambda self: self.background.under_way)
    @rule(disk_fails=st.sampled_from([False, False, True]))
    def arrive(self, disk_fails: bool) -> None:
        self.disk.fails = disk_fails
        self.background.arrive()
        self.disk.fails = False

    @rule(limit=st.integers(1, 4), disk_fails=st.sampled_from([False, False, True]))
    def promote(self, limit: int, disk_fails: bool) -> None:
        """Experts move into host memory, and others out of it."""
        self.disk.fails = disk_fails
        num_promoted = self.promoter.promote_some(limit)
        assert not (disk_fails and num_promoted)
        self.disk.fails = False

    @precondition(lambda self: self.can_pack)
    @rule(
        num_frames=st.integers(0, 12), experts=st.lists(st.sampled_from(ALL_EXPERTS), unique=True)
    )
    def pack(self, num_frames: int, experts: list[tuple[int, int]]) -> None:
        """A plan may say anything."""
        before = self.memory.snapshot(0)
        self.memory.pack(num_frames, experts)
        now = self.memory.snapshot(0)
        assert now.packed_frames <= num_frames
        assert (now.kv_frames, now.cached_pages) == (before.kv_frames, before.cached_pages)

    @rule(ratio=st.sampled_from([0.0, 0.1, 0.7, 1.0]))
    def change_decoding(self, ratio: float) -> None:
        self.decode_ratio = ratio

    @precondition(lambda self: self.num_admitted % 8 == 5 and not self.requests)
    @rule()
    def clear(self) -> None:
        self.wave = None
        self.memory.clear()
        snapshot = self.memory.snapshot(0)
        assert snapshot.free_frames == snapshot.num_frames
        assert not self.background.under_way

    def check_wave(self, layer: int, wave: ExpertIds) -> None:
        assert len(wave)
        for expert in wave.tolist():
            frame = self.memory.frame_table[layer, expert]
            assert frame >= 0
            assert (self.arena[frame] == expert_number(layer, expert)).all()
        assert self.memory.violations() == []

    # ------------------------------------------------------------------------------------ contents

    @invariant()
    def laws_hold(self) -> None:
        assert self.memory.violations() == []
        assert self.tier.violations() == []

    @invariant()
    def the_drawing_is_what_is_counted(self) -> None:
        drawn, now = self.memory.draw(self.tier.held()), self.memory.snapshot(0)
        frames, experts = Counter(drawn.frames), Counter("".join(drawn.residency))
        assert frames["."] == now.free_frames
        assert frames["e"] + frames["l"] == now.expert_frames
        assert frames["k"] + frames["c"] == now.kv_frames
        assert frames["p"] == now.packed_frames
        assert experts["r"] + experts["a"] == np.count_nonzero(self.memory.frame_table >= 0)
        assert experts["l"] == frames["l"]
        assert sum(experts.values()) == NUM_LAYERS * NUM_EXPERTS
        assert np.count_nonzero(self.tier.held()) == now.host_blocks_filled

    @invariant()
    def frames_are_all_accounted_for(self) -> None:
        now = self.memory.snapshot(0)
        used = now.expert_frames + now.kv_frames + now.packed_frames
        assert now.free_frames + used == now.num_frames
        assert now.packed_experts <= now.packed_hits + now.packed_kept

    @invariant()
    def prefetches_end_once(self) -> None:
        now = self.memory.snapshot(0)
        num_on_their_way = len(self.background.under_way) + len(self.background.ended)
        num_ended = now.prefetches_used + now.prefetches_late + now.prefetches_wasted
        assert num_ended + num_on_their_way <= now.prefetches_begun

    @invariant()
    def requests_read_what_they_computed(self) -> None:
        for rid, request in self.requests.items():
            found = self.arena[self.cells(rid, 0, request.num_computed)]
            assert found.tolist() == request.kv(0, request.num_computed)

    @invariant()
    def residents_are_in_their_frames(self) -> None:
        for layer, expert in np.argwhere(self.memory.frame_table >= 0).tolist():
            frame = self.memory.frame_table[layer, expert]
            assert (self.arena[frame] == expert_number(layer, expert)).all()


LONG = settings.get_current_profile_name() == "long"  # 200,000 operations

MemoryMachine.TestCase.settings = settings(
    max_examples=4000 if LONG else 60,
    stateful_step_count=50,
    deadline=None,
    derandomize=not LONG,
    database=None,
)
TestMemory = MemoryMachine.TestCase
