"""Packed experts in a replay: counted by hand, and with nothing packed the product's own memory."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_replay import GEOMETRY, trace_of

from eval.packed_memory import PackedClass, PackedMemory
from eval.packed_replay import Machine, Outcome, Setting, System, joined, replay
from eval.replay import policy_counts
from sglmoe.config import MemoryPolicy
from sglmoe.memory import packed_share
from sglmoe.memory.arena import Geometry
from sglmoe.memory.packed_share import Form, FormCosts, SlabClass

COSTS = FormCosts(link_seconds=0.009, decode_seconds=0.001)


def frames_of(num_frames: int) -> Geometry:
    return msgspec.structs.replace(GEOMETRY, num_frames=num_frames)


# One layer, one expert a step: 0 1 2 3, again and again.
CIRCLE = [[[step % 4]] for step in range(40)]


def test_packed_experts_are_decoded_where_frames_would_load() -> None:
    """Two frames. One is a run that holds four packed experts. The first is loaded; the others come in the background,
    one a step, before it is their turn."""
    memory = PackedMemory(
        (1, 4),
        frames_of(2),
        floor_frames=1,
        slab=SlabClass(1, 4),
        costs=COSTS,
        share=0.5,
    )
    counts = [memory.run_step(step) for step in CIRCLE]
    assert [its.groups for its in counts] == [[(0, 1)]] + [[(1, 0)]] * 39
    assert [its.moves for its in counts] == [1, 1, 1] + [0] * 37


def outcome_of(system: System, decode_bytes_per_second: float = 1e6) -> Outcome:
    """1000 bytes at 100 kB/s take 10 ms; packed they are half, and decoded in 1 ms. A group takes 0.1 ms more."""
    machine = Machine("slow", 1e5, decode_bytes_per_second, latency_seconds=1e-4, layer_seconds=0.0)
    setting = Setting(CIRCLE, trace_of(CIRCLE), 2, machine, 1000, SlabClass(1, 4), 0.5, False)
    return replay(setting, system)


def test_a_step_waits_for_what_is_decoded_and_loaded() -> None:
    half = outcome_of(System("half", 0.5))
    assert half.stall_seconds == pytest.approx((6.1e-3 + 39 * 1.1e-3) / 40)
    assert (half.hit_ratio, half.packed_ratio, half.packed_share) == (0.0, 39 / 40, 0.5)


def test_frames_alone_load_what_they_miss_packed_or_not() -> None:
    hits, misses, _ = policy_counts(trace_of(CIRCLE), CIRCLE, 2, MemoryPolicy.COST_AWARE)
    as_it_is = outcome_of(System("ready", 0.0, is_link_packed=False, keeps_ready=False))
    packed = outcome_of(System("packed link", 0.0, keeps_ready=False))
    assert as_it_is.hit_ratio == packed.hit_ratio == hits / 40
    assert as_it_is.stall_seconds == pytest.approx(misses * 10.1e-3 / 40)
    assert packed.stall_seconds == pytest.approx(misses * 6.1e-3 / 40)


def test_the_plan_packs_where_decoding_is_fast_and_else_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_share, "MIN_RUNNING", 1.0)  # one request is enough to tell
    alone = outcome_of(System("packed link", 0.0))
    planned = outcome_of(System("planned", None))
    # Nothing is known in the first 16 of 40 steps.
    assert planned.packed_share == pytest.approx(0.5 * 24 / 40)
    assert planned.stall_seconds < 0.8 * alone.stall_seconds
    slow = outcome_of(System("planned", None), decode_bytes_per_second=1e4)
    assert slow.packed_share == 0


def test_parts_of_a_trace_run_at_once() -> None:
    steps = [[[0], [1]], [[1], [1, 2]], [[2], [3]], [[1], [0]], [[3], [3]]]
    assert joined(steps, 1) == steps
    assert joined(steps, 2) == [[[0, 2], [1, 3]], [[1], [0, 1, 2]]]


def test_who_should_not_be_packed_gives_way() -> None:
    its = PackedClass((1, 4))
    forms = np.full((1, 4), Form.PACKED, np.int8)
    used = np.array([[0.1, 0.4, 0.3, 0.2]])
    its.follow(forms, 2, used)
    its.offer((0, 0))
    its.offer((0, 1))
    its.offer((0, 2))  # all others there should be: it stays away
    assert np.flatnonzero(its.is_packed).tolist() == [0, 1]
    forms = np.array([[Form.AWAY, Form.READY, Form.PACKED, Form.PACKED]], np.int8)
    its.follow(forms, 2, used)
    its.offer((0, 2))
    assert np.flatnonzero(its.is_packed).tolist() == [1, 2], "0 is used least"
    its.offer((0, 0))
    assert np.flatnonzero(its.is_packed).tolist() == [1, 2], "0 should not be packed"
    its.follow(forms, 1, used)
    assert np.flatnonzero(its.is_packed).tolist() == [2]
    assert its.violations() == []


Steps = list[list[list[int]]]


@st.composite
def traces(draw: st.DrawFn) -> Steps:
    layer = st.lists(st.integers(0, 3), min_size=2, max_size=2, unique=True)
    return draw(st.lists(st.lists(layer, min_size=3, max_size=3), min_size=1, max_size=50))


@given(traces(), st.integers(2, 12))
@settings(derandomize=True, database=None)
def test_with_nothing_packed_it_is_the_products_memory(steps: Steps, num_frames: int) -> None:
    trace = trace_of(steps)
    layers = trace.experts_by_layer()
    memory = PackedMemory(
        (3, 4),
        frames_of(num_frames),
        floor_frames=1,
        slab=None,
        costs=COSTS,
        keeps_ready=False,
    )
    counts = [memory.run_step(step) for step in layers]
    hits, misses, groups = policy_counts(trace, layers, num_frames, MemoryPolicy.COST_AWARE)
    assert sum(its.hits for its in counts) == hits
    assert sum(loaded for its in counts for _, loaded in its.groups) == misses
    assert sum(len(its.groups) for its in counts) == groups


@given(
    traces(),
    st.integers(2, 12),
    st.sampled_from([None, 0.25, 0.5, 1.0]),
    st.sampled_from([SlabClass(1, 2), SlabClass(2, 3), None]),
    st.floats(1e-5, 1e-2),
)
@settings(derandomize=True, database=None)
def test_every_use_is_a_hit_decoded_or_loaded(
    steps: Steps, num_frames: int, share: float | None, slab: SlabClass | None, decode: float
) -> None:
    layers = trace_of(steps).experts_by_layer()
    memory = PackedMemory(
        (3, 4),
        frames_of(num_frames),
        floor_frames=1,
        slab=slab,
        costs=FormCosts(0.009, decode),
        share=share,
    )
    for step in layers:
        counts = memory.run_step(step)
        assert memory.violations() == []
        assert counts.packed_frames < num_frames
        assert counts.hits + sum(map(sum, counts.groups)) == sum(map(len, step))
        if slab is None:
            assert not any(packed for packed, _ in counts.groups)
