"""Decode steps out of captured graphs, on a stand-in for CUDA's: graphs that break at each MoE layer, and full ones.

Half of the experts fit. What runs is SGLang's own padding, buffers, capture and replay, our layer in the breaks or captured,
our memory under it; what is not shown here is a GPU's (`tests/gpu/test_graphs.py`).
"""

import time
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from forking import run_in_fork
from loaded_worker import LoadedWorker
from recorded_graphs import RecordedGraph, capture_on_cpu
from test_families_reference import random_prompts

from sglmoe.decode_graphs import graph_bytes
from sglmoe.memory.arena import Geometry
from sglmoe.memory.store import ExpertReadError
from sglmoe.protocol import LogprobSpec, MemorySnapshot, Row, RowResult

pytestmark = pytest.mark.usefixtures("preloaded")

SIZES = [1, 2, 4]  # of captured steps: one of three requests is padded, one of five is not captured
STEPS = 6
NUM_FRAMES = 28  # for 48 experts in all layers, and KV
MAX_RUNNING = 8
PROMPTS = random_prompts(40, 17, 8, 33, 25)


Backend = Literal["disabled", "breakable", "full"]


class Budgets(NamedTuple):
    model_dir: Path
    eager: int
    captured: int  # with what graphs and padding take on top


class Decoded(NamedTuple):
    """What a worker made of some requests, one row of each a step."""

    rows: list[list[RowResult]]  # [STEPS][requests]
    memory: MemorySnapshot
    geometry: Geometry
    num_segments: int  # that were replayed
    num_layers: int  # of experts
    violations: list[str]


def measure(model_dir: Path) -> Budgets:
    loaded = LoadedWorker(model_dir, dtype="float32", max_running_requests=MAX_RUNNING).loaded
    eager = loaded.dense_bytes + NUM_FRAMES * loaded.geometry.frame_bytes
    config = loaded.runner.model_config
    graphs = graph_bytes(4, context_tokens=config.context_len, vocab_size=config.vocab_size)
    return Budgets(model_dir, eager, eager + graphs + loaded.geometry.page_bytes)


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen2_moe", "deepseek_v2"])
def budgets(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, preloaded: None
) -> Budgets:
    model_dir = run_in_fork(
        make_checkpoint,
        request.param,
        tmp_path_factory.mktemp("graphs"),
        dtype="float32",
        attention_gain=1.0,
    )
    return run_in_fork(measure, model_dir)


def decode(
    budgets: Budgets,
    num_requests: int,
    *,
    backend: Backend = "breakable",
    spoils_padding: bool = False,
    fails: bool = False,
) -> Decoded:
    """Prompts are computed one by one, then all requests decode together; with `fails`, in vain in the middle of it."""
    is_captured = backend != "disabled"
    worker = LoadedWorker(
        budgets.model_dir,
        budget=str(budgets.captured if is_captured else budgets.eager),
        host_memory="8MB" if backend == "full" else None,  # for all experts
        before_loading=(lambda: capture_on_cpu(SIZES, backend)) if is_captured else None,
        dtype="float32",
        max_running_requests=MAX_RUNNING,
    )
    untouched = worker.loaded.memory.snapshot(0)
    assert (untouched.expert_hits, untouched.expert_misses, untouched.kv_frames) == (0, 0, 0)
    if backend == "full":
        fill_host_memory(worker)
    rids = [f"r{index}" for index in range(num_requests)]
    for rid, prompt in zip(rids, PROMPTS, strict=False):
        logprobs = LogprobSpec(start=len(prompt), num_top=3, token_ids=None)
        worker.add(rid, prompt, num_tokens=STEPS + 1, logprobs=logprobs, routed_experts_start=0)
        worker.step(Row(rid, len(prompt)))
    RecordedGraph.num_replays = 0
    rows = []
    for number in range(STEPS):
        if spoils_padding:
            spoil_padding(worker.loaded.runner.token_to_kv_pool)
        if fails and number == STEPS // 2:
            fail_once(worker, rids)
        rows.append(list(worker.step(*(Row(rid, 1) for rid in rids)).rows))
    memory = worker.loaded.memory
    return Decoded(
        rows,
        memory.snapshot(0),
        worker.loaded.geometry,
        RecordedGraph.num_replays,
        len(worker.loaded.experts.layer_ids),
        memory.violations(),
    )


@cache
def decode_eagerly(budgets: Budgets, num_requests: int) -> Decoded:
    return run_in_fork(decode, budgets, num_requests, backend="disabled")


def fill_host_memory(worker: LoadedWorker) -> None:
    """It fills by itself, in the background."""
    deadline = time.monotonic() + 30
    while not worker.loaded.tier.holds_all:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def fail_once(worker: LoadedWorker, rids: list[str]) -> None:
    """A step in which no expert can be read, and none is there."""
    worker.loaded.memory.clear()

    def unreadable(*_: Any, **__: Any) -> int:
        raise ExpertReadError("the disk is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.loaded.experts.store, "read", unreadable)
        result = worker.step(*(Row(rid, 1) for rid in rids))
    assert [failure.rid for failure in result.failed] == rids
    assert worker.loaded.memory.violations() == []


def spoil_padding(pool: Any) -> None:
    """No numbers in the KV that padding rows wrote."""
    buffers = pool.kv_buffer if hasattr(pool, "kv_buffer") else [*pool.k_buffer, *pool.v_buffer]
    for buffer in buffers:
        buffer[0] = torch.nan


def counters(decoded: Decoded) -> dict[str, Any]:
    """What memory did, but for times."""
    its = msgspec.structs.asdict(decoded.memory)
    return {name: value for name, value in its.items() if not name.endswith("_seconds")}


@pytest.mark.parametrize("num_requests", [1, 4, 5])
def test_replayed_steps_have_the_bits_of_eager_ones(budgets: Budgets, num_requests: int) -> None:
    eager = decode_eagerly(budgets, num_requests)
    captured = run_in_fork(decode, budgets, num_requests)
    assert captured.rows == eager.rows  # tokens, log probabilities, routing
    assert counters(captured) == counters(eager)
    assert captured.memory.expert_misses > 0
    assert captured.geometry.num_frames == eager.geometry.num_frames == NUM_FRAMES
    assert captured.geometry.padding_pages == 1
    assert captured.violations == []
    is_captured = num_requests <= max(SIZES)
    assert captured.num_segments == is_captured * STEPS * (captured.num_layers + 1)
    assert eager.num_segments == 0


@pytest.mark.parametrize("num_requests", [1, 2])
def test_steps_without_the_host_have_the_bits_of_eager_ones(
    budgets: Budgets, num_requests: int
) -> None:
    eager = decode_eagerly(budgets, num_requests)
    full = run_in_fork(decode, budgets, num_requests, backend="full")
    assert full.rows == eager.rows  # tokens, log probabilities, routing
    assert full.num_segments == STEPS  # one graph each
    assert full.memory.expert_misses > 0
    assert full.violations == []


def test_steps_that_could_need_more_frames_than_there_are_ask_the_host(budgets: Budgets) -> None:
    """Four rows may need all experts of each layer, and half of them fit."""
    full = run_in_fork(decode, budgets, 4, backend="full")
    assert full.rows == decode_eagerly(budgets, 4).rows
    assert full.num_segments == 0


def test_rows_that_pad_a_step_are_seen_by_nobody(budgets: Budgets) -> None:
    eager = decode_eagerly(budgets, 3)
    padded = run_in_fork(decode, budgets, 3)
    assert padded.num_segments == STEPS * (padded.num_layers + 1)
    for step, expected in zip(padded.rows, eager.rows, strict=True):
        assert [row.token_id for row in step] == [row.token_id for row in expected]
        assert [row.routed_experts for row in step] == [row.routed_experts for row in expected]
    # Dense layers compute four rows instead of three, which may move last bits, here as with SGLang.
    np.testing.assert_allclose(logprobs_of(padded), logprobs_of(eager), atol=1e-5)
    assert counters(padded) == counters(eager)
    assert padded.violations == []
    spoiled = run_in_fork(decode, budgets, 3, spoils_padding=True)
    assert spoiled.rows == padded.rows


def logprobs_of(decoded: Decoded) -> np.ndarray:
    return np.array([[row.logprobs.top_logprobs for row in step] for step in decoded.rows])


def test_a_step_that_fails_in_a_break_leaves_graphs_that_can_be_replayed(budgets: Budgets) -> None:
    eager = decode_eagerly(budgets, 2)
    captured = run_in_fork(decode, budgets, 2, fails=True)
    assert captured.rows == eager.rows
    assert captured.violations == []
