"""Requests that decode together, eagerly or out of graphs that a stand-in for CUDA's has recorded; half of the experts fit.

What runs is SGLang's own padding, buffers, capture and replay, our layer in the breaks or captured, our memory under it; what
is not shown here is a GPU's (`tests/gpu/test_graphs.py`).
"""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from forking import run_in_fork
from loaded_worker import LoadedWorker
from recorded_graphs import RecordedGraph, RecordedKernels, capture_on_cpu
from test_families_reference import random_prompts

from sglmoe.decode_graphs import graph_bytes
from sglmoe.memory.arena import Geometry
from sglmoe.memory.prefetch import Wanted
from sglmoe.memory.store import ExpertReadError
from sglmoe.protocol import LogprobSpec, MemorySnapshot, Row, RowResult
from sglmoe.worker.routed import Routed

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


@cache
def make_budgets(family: str, base: Path) -> Budgets:
    """Of a checkpoint that is made once, somewhere in `base`: two files of tests compare with what it answers eagerly."""
    directory = base / f"captured-{family}"
    directory.mkdir()
    model_dir = run_in_fork(make_checkpoint, family, directory, dtype="float32", attention_gain=1.0)
    return run_in_fork(measure, model_dir)


def decode(
    budgets: Budgets,
    num_requests: int,
    *,
    backend: Backend = "breakable",
    spoils_padding: bool = False,
    fails: bool = False,
    foreseen: Decoded | None = None,
) -> Decoded:
    """Prompts are computed one by one, then all requests decode together; with `fails`, in vain in the middle of it.

    With `foreseen`, which is the same decoding, experts that it used are prefetched at layers' boundaries.
    """
    worker = load_worker(budgets, backend, expert_prefetch="on" if foreseen else None)
    untouched = worker.loaded.memory.snapshot(0)
    assert (untouched.expert_hits, untouched.expert_misses, untouched.kv_frames) == (0, 0, 0)
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
        if foreseen:
            foresee(worker, foreseen.rows[number])
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


class Followed(NamedTuple):
    """What a worker made of requests that want nothing but tokens, and one of them their log probabilities."""

    tokens: list[list[int | None]]  # [STEPS][requests]
    logprobs: list[float | None]  # [STEPS]
    kv: list[bytes]  # of each request, in all layers
    num_followed: int  # steps that began before the one in front of them was finished
    num_segments: int
    memory: MemorySnapshot
    violations: list[str]


def decode_plainly(
    budgets: Budgets, num_requests: int, *, backend: Backend, num_steps: int = STEPS, **flags: Any
) -> Followed:
    """The same prompts, and each step begins as soon as it can."""
    worker = load_worker(budgets, backend, **flags)
    rids = [f"r{index}" for index in range(num_requests)]
    for rid, prompt in zip(rids, PROMPTS, strict=False):
        logprobs = LogprobSpec(len(prompt), 0, None) if rid == rids[0] else None
        worker.add(rid, prompt, num_tokens=num_steps + 1, logprobs=logprobs)
        worker.step(Row(rid, len(prompt)))
    RecordedGraph.num_replays = 0
    results, num_followed = worker.steps(*(Row(rid, 1) for rid in rids), num_steps=num_steps)
    memory, pool = worker.loaded.memory, worker.loaded.runner.token_to_kv_pool
    buffers = pool.kv_buffer if hasattr(pool, "kv_buffer") else [*pool.k_buffer, *pool.v_buffer]
    ids = [
        torch.from_numpy(memory.token_ids(rid, 0, len(prompt) + num_steps)).long()
        for rid, prompt in zip(rids, PROMPTS, strict=False)
    ]
    return Followed(
        [[row.token_id for row in result.rows] for result in results],
        [row.logprobs.logprob for result in results for row in result.rows if row.logprobs],
        [b"".join(its[where].numpy().tobytes() for its in buffers) for where in ids],
        num_followed,
        RecordedGraph.num_replays,
        memory.snapshot(0),
        memory.violations(),
    )


def load_worker(budgets: Budgets, backend: Backend, **flags: Any) -> LoadedWorker:
    is_captured = backend != "disabled"
    worker = LoadedWorker(
        budgets.model_dir,
        budget=str(budgets.captured if is_captured else budgets.eager),
        host_memory="8MB" if backend == "full" else None,  # for all experts
        before_loading=(lambda: capture_on_cpu(SIZES, backend)) if is_captured else None,
        dtype="float32",
        max_running_requests=MAX_RUNNING,
        **flags,
    )
    if backend == "full":
        fill_host_memory(worker)
    return worker


def foresee(worker: LoadedWorker, rows: list[RowResult]) -> None:
    """In this step have what the next layer will use prefetched at each boundary, one by one, before the step goes on; and see
    that the observer is told what routers say."""
    memory, captured = worker.loaded.memory, worker.loaded.captured
    assert captured is not None
    assert captured.letters is not None
    posted = captured.letters.mailbox.posted
    numbers = worker.loaded.experts.layer_ids  # sglang's
    routed = [row.routed_experts for row in rows]
    ids = [np.frombuffer(its.ids, np.int32).reshape(its.shape) for its in routed if its]

    def check_routed(layer: int, its: Routed) -> None:
        assert its.ids.tolist() == [request[0, numbers[layer]].tolist() for request in ids]
        assert its.logits.isfinite().all()
        assert its.hidden.isfinite().all()

    observer = SimpleNamespace(num_ahead=1, routed=check_routed, look_ahead=int)
    worker.loaded.experts.observer = observer

    def at_boundary(layer: int) -> None:
        if layer + 1 == len(numbers):
            return
        used = {int(expert) for its in ids for expert in its[0, numbers[layer + 1]]}
        before = int(posted.sum())
        begun = memory.prefetch((Wanted(layer + 1, expert, 1.0) for expert in sorted(used)), 1)
        wait_until(lambda: int(posted.sum()) == before + begun)

    RecordedKernels.at_boundary = at_boundary


@cache
def decode_eagerly(budgets: Budgets, num_requests: int) -> Decoded:
    return run_in_fork(decode, budgets, num_requests, backend="disabled")


def fill_host_memory(worker: LoadedWorker) -> None:
    """It fills by itself, in the background."""
    wait_until(lambda: worker.loaded.tier.holds_all)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
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


def logprobs_of(decoded: Decoded) -> np.ndarray:
    return np.array([[row.logprobs.top_logprobs for row in step] for step in decoded.rows])
