"""Replaying traces: the oracle is the best there is, and the server's own counters come back."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.oracle import oracle_counts
from eval.replay import EXPERT_POLICIES, Link, bounds, replay_experts, replay_whole
from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Geometry
from sglmoe.prediction.trace import FORMAT_VERSION, Totals, Trace, TraceInfo

LINK = Link(bytes_per_second=1e6, latency_seconds=1e-3, layer_seconds=5e-3)
GEOMETRY = Geometry(
    num_frames=8,
    frame_bytes=1000,
    expert_bytes=1000,
    page_bytes=500,
    page_tokens=4,
    pages_per_frame=2,
    page_rows=16,
)
TOTALS = Totals(*[0] * len(Totals.__struct_fields__))


def trace_of(steps: list[list[list[int]]]) -> Trace:
    """One token a step; its experts by layer."""
    expert_ids = np.array(steps, np.uint8)
    num_steps, num_layers, top_k = expert_ids.shape
    info = TraceInfo(
        version=FORMAT_VERSION,
        model="tiny",
        num_layers=num_layers,
        num_experts=4,
        top_k=top_k,
        geometry=GEOMETRY,
        floor_frames=1,
        policy=MemoryPolicy.LRU,
        expert_ratio=0.0,
        totals=TOTALS,
        namespaces=[],
    )
    return Trace(
        info=info,
        operations=np.empty((0, 5), np.int32),
        request_tokens=np.empty(0, np.int32),
        request_bounds=np.zeros(1, np.int64),
        token_ids=np.zeros(num_steps, np.int32),
        positions=np.zeros(num_steps, np.int32),
        owners=np.zeros(num_steps, np.int32),
        expert_ids=expert_ids,
        probabilities=np.zeros((num_steps, num_layers, 4), np.float16),
        step_bounds=np.arange(num_steps + 1),
        step_seconds=np.zeros(num_steps, np.float32),
    )


# One layer, a token a step, one expert each: 0 1 2 0 1 2.
ROUND_ROBIN = trace_of([[[0]], [[1]], [[2]], [[0]], [[1]], [[2]]])


def test_lru_loses_where_the_oracle_hits() -> None:
    # Two frames. LRU always drops the expert that comes next; the oracle keeps 0, then 1.
    lru = replay_experts(ROUND_ROBIN, 2, LINK, "lru")
    oracle = replay_experts(ROUND_ROBIN, 2, LINK, "oracle")
    assert (lru.hits, lru.misses) == (0, 6)
    assert (oracle.hits, oracle.misses) == (2, 4)


def test_time_is_compute_and_demand_loads() -> None:
    # 5 ms of compute a step; each of 4 misses in 6 steps costs 1 ms and 1000 bytes at 1 MB/s.
    oracle = replay_experts(ROUND_ROBIN, 2, LINK, "oracle")
    assert oracle.step_seconds == pytest.approx((6 * 5e-3 + 4 * 2e-3) / 6)
    assert oracle.bytes_moved == 4000


def test_bounds_are_all_loads_and_none() -> None:
    no_cache, no_link = bounds(ROUND_ROBIN, LINK)
    assert (no_cache.misses, no_cache.step_seconds) == (6, pytest.approx(7e-3))
    assert (no_link.misses, no_link.step_seconds) == (0, pytest.approx(5e-3))


def test_experts_of_a_step_are_distinct_and_ascending() -> None:
    # Two layers, top 2; layer 1 twice the same.
    trace = trace_of([[[3, 1], [2, 0]], [[0, 2], [0, 2]]])
    assert trace.experts_by_layer() == [[[1, 3], [0, 2]], [[0, 2], [0, 2]]]


Accesses = list[list[list[int]]]


@st.composite
def accesses(draw: st.DrawFn) -> Accesses:
    """Up to 6 steps of 2 layers with up to 3 of 3 experts each."""
    layer = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True).map(sorted)
    return draw(st.lists(st.lists(layer, min_size=2, max_size=2), min_size=1, max_size=6))


@given(accesses(), st.integers(3, 6))
def test_oracle_is_the_best_of_all_evictions(steps: Accesses, num_frames: int) -> None:
    sets = [frozenset((i, e) for e in experts) for step in steps for i, experts in enumerate(step)]
    hits, misses, _ = oracle_counts(steps, num_frames)
    assert hits == most_hits(tuple(sets), num_frames)
    assert hits + misses == sum(map(len, sets))


def most_hits(sets: tuple[frozenset[tuple[int, int]], ...], num_frames: int) -> int:
    """By trying every choice of what stays resident beside the experts in use."""

    @cache
    def best(now: int, resident: frozenset[tuple[int, int]]) -> int:
        if now == len(sets):
            return 0
        others = resident - sets[now]
        num_kept = min(len(others), num_frames - len(sets[now]))
        rest = max(
            best(now + 1, sets[now] | frozenset(kept))
            for kept in itertools.combinations(sorted(others), num_kept)
        )
        return len(resident & sets[now]) + rest

    return best(0, frozenset())


@given(
    st.lists(
        st.lists(
            st.lists(st.integers(0, 3), min_size=2, max_size=2, unique=True),
            min_size=3,
            max_size=3,
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(2, 12),
)
def test_no_policy_hits_more_often_than_the_oracle(steps: Accesses, num_frames: int) -> None:
    trace = trace_of(steps)
    *others, oracle = (replay_experts(trace, num_frames, LINK, name) for name in EXPERT_POLICIES)
    for policy in others:
        assert policy.hits <= oracle.hits
        assert policy.hits + policy.misses == oracle.hits + oracle.misses
        assert not math.isnan(policy.step_seconds)


def test_a_trace_of_nothing_gives_nothing() -> None:
    assert replay_whole(ROUND_ROBIN) == TOTALS
