"""Random steps against a real arena: whoever reads finds what he wrote, and the laws always hold.

The arena is an array of ints. A token's KV depends on all tokens before it, so it is a checksum of
these here; an expert's frame is full of its number. So a page or frame that has two users, or that
is handed on too early, shows as wrong contents, whatever the counters say.
"""

import zlib
from collections.abc import Generator, Sequence

import numpy as np
import pytest
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

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Geometry
from sglmoe.memory.experts import ExpertIds, Load
from sglmoe.memory.manager import MemoryManager

NUM_LAYERS, NUM_EXPERTS = 2, 4
PAGE_TOKENS = 4
PAGE_ROWS = 2 * 3 * PAGE_TOKENS

# Beginnings of four texts that diverge within a page, at its end, and at once.
TEXTS = ([1] * 28, [1] * 10 + [2] * 18, [1] * 16 + [2] * 12, [2] * 28)
PROMPTS = st.builds(
    lambda text, num_tokens: text[:num_tokens], st.sampled_from(TEXTS), st.integers(1, 28)
)
NAMESPACES = st.sampled_from(["", "", "other"])


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
        self.fail_loads = False

    @initialize(
        num_frames=st.integers(2, 12),
        pages_per_frame=st.sampled_from([1, 2, 3, 6]),
        floor_frames=st.integers(1, 3),
        policy=st.sampled_from(MemoryPolicy),
        layer_frames=st.integers(1, 3),
    )
    def build(
        self,
        num_frames: int,
        pages_per_frame: int,
        floor_frames: int,
        policy: MemoryPolicy,
        layer_frames: int,
    ) -> None:
        self.pages_per_frame = pages_per_frame
        if policy is MemoryPolicy.STATIC:
            num_frames = max(num_frames, NUM_LAYERS * layer_frames + 1)
            floor_frames = 1
        floor_frames = min(floor_frames, num_frames - 1)
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
        )
        self.memory = MemoryManager(
            geometry,
            num_layers=NUM_LAYERS,
            num_experts=NUM_EXPERTS,
            floor_frames=floor_frames,
            load_experts=self.load,
            policy=policy,
            expert_ratio=(NUM_LAYERS * layer_frames + 0.5) / num_frames,
        )

    def load(self, loads: Sequence[Load]) -> None:
        assert loads
        for load in loads:
            self.arena[load.frame] = expert_number(load.layer, load.expert)
        if self.fail_loads:
            raise OSError("the disk is gone")

    def cells(self, rid: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in the arena the tokens of these positions are."""
        ids = self.memory.token_ids(rid, start, stop)
        assert ids.tolist() == [self.memory.token_id(rid, at) for at in range(start, stop)]
        pages, offsets = np.divmod(ids, PAGE_ROWS)
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

    @rule(num_steps=st.sampled_from([1, 1, 1, 100]))
    def begin_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.memory.begin_step()

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
    @rule(layer=st.integers(0, NUM_LAYERS - 1))
    def fail_to_load(self, layer: int) -> None:
        self.wave = None
        absent = np.flatnonzero(self.memory.frame_table[layer] < 0)
        if not absent.size:
            return
        self.fail_loads = True
        with pytest.raises(OSError, match="the disk is gone"):
            next(self.memory.waves(layer, absent.tolist()))
        self.fail_loads = False
        assert (self.memory.frame_table[layer, absent] < 0).all()

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


def expert_number(layer: int, expert: int) -> int:
    return -1 - layer * NUM_EXPERTS - expert


LONG = settings.get_current_profile_name() == "long"  # 200,000 operations

MemoryMachine.TestCase.settings = settings(
    max_examples=4000 if LONG else 60,
    stateful_step_count=50,
    deadline=None,
    derandomize=not LONG,
    database=None,
)
TestMemory = MemoryMachine.TestCase
