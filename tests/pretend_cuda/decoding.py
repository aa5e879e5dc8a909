"""Two requests that decode together on a worker, on the pretended device or on the CPU. In a fork only (`forking`)."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from cuda_device import Device
from graphs_on_it import record_graphs
from loaded_worker import LoadedWorker
from recorded_graphs import RecordedGraph
from sglang_on_it import sglang_on_it

from sglmoe.decode_graphs import graph_bytes
from sglmoe.memory.prefetch import Wanted
from sglmoe.protocol import LogprobSpec, MemorySnapshot, Row, RowResult

PROMPTS = ([5, 9, 2, 7, 1], [11, 12, 13])
STEPS = 2
WAIT_SECONDS = 20.0  # far more than anything here takes


class Decoded(NamedTuple):
    rows: list[list[RowResult]]  # [STEPS][requests]
    waits: list[str]  # of the host for the device, in the last step
    memory: MemorySnapshot
    layer_ids: list[int]  # sglang's, of the layers with experts
    num_segments: int  # that were replayed
    violations: list[str]

    @property
    def tokens(self) -> list[list[int | None]]:
        return [[row.token_id for row in rows] for rows in self.rows]


class Budget(NamedTuple):
    """For so many frames beside the dense weights."""

    dense_bytes: int
    frame_bytes: int
    reserved_bytes: int  # by graphs of two rows, with a page for their padding

    def bytes(self, num_frames: int, *, captures: bool) -> str:
        frames = self.dense_bytes + num_frames * self.frame_bytes
        return str(frames + (self.reserved_bytes if captures else 0))


def measure(model_dir: Path, dtype: str) -> Budget:
    loaded = LoadedWorker(model_dir, dtype=dtype).loaded
    config = loaded.runner.model_config
    graphs = graph_bytes(2, context_tokens=config.context_len, vocab_size=config.vocab_size)
    its = loaded.geometry
    return Budget(loaded.dense_bytes, its.frame_bytes, graphs + its.page_bytes)


def decode(
    model_dir: Path,
    *,
    on_device: bool = True,
    backend: str = "disabled",
    prompts: Sequence[list[int]] = PROMPTS,
    spoils_padding: bool = False,
    foreseen: Decoded | None = None,
    num_packed: int = 0,
    **options: Any,
) -> Decoded:
    """`spoils_padding`: no numbers are where the KV of rows that pad a step would be, which nobody writes. `foreseen`: the same
    decoding; memory is asked for experts that it used, at layers' boundaries. `num_packed`: so many frames hold packed experts,
    any that come by."""
    with sglang_on_it() if on_device else nullcontext() as device:
        worker = load_worker(model_dir, device, backend, **options)
        if spoils_padding:
            spoil_padding(worker.loaded.runner.token_to_kv_pool)
        if num_packed:
            shape = worker.loaded.memory.frame_table.shape
            worker.loaded.memory.pack(num_packed, [*product(*map(range, shape))])
        rids = [f"r{index}" for index in range(len(prompts))]
        for rid, prompt in zip(rids, prompts, strict=True):
            logprobs = LogprobSpec(start=len(prompt), num_top=3, token_ids=None)
            worker.add(rid, prompt, num_tokens=STEPS + 1, logprobs=logprobs, routed_experts_start=0)
            prefill(worker, rid, prompt)
        RecordedGraph.num_replays = 0
        rows = []
        for number in range(STEPS):
            begin_step(device)
            if foreseen is not None and device is not None:
                foresee(worker, foreseen.rows[number], device)
            rows.append(list(worker.step(*(Row(rid, 1) for rid in rids)).rows))
        memory = worker.loaded.memory
        return Decoded(
            rows,
            [] if device is None else device.waits,
            memory.snapshot(0),
            worker.loaded.experts.layer_ids,
            RecordedGraph.num_replays,
            memory.violations(),
        )


class Ahead(NamedTuple):
    """Of requests that want nothing but tokens and their log probabilities."""

    tokens: list[list[int | None]]  # [STEPS][requests]
    logprobs: list[list[float | None]]
    num_followed: int  # steps that began before the one in front of them was finished
    begin_waits: list[list[str]]  # of the host, while each step began
    memory: MemorySnapshot
    violations: list[str]


def decode_ahead(model_dir: Path, *, num_steps: int, backend: str, **options: Any) -> Ahead:
    """On the device, each step as soon as it can."""
    with sglang_on_it() as device:
        worker = load_worker(model_dir, device, backend, **options)
        rids = [f"r{index}" for index in range(len(PROMPTS))]
        for rid, prompt in zip(rids, PROMPTS, strict=True):
            logprobs = LogprobSpec(start=len(prompt), num_top=0, token_ids=None)
            worker.add(rid, prompt, num_tokens=num_steps + 1, logprobs=logprobs)
            prefill(worker, rid, prompt)
        begin_waits: list[list[str]] = []

        def on_begun() -> None:
            begin_waits.append(list(device.waits))
            device.waits.clear()

        device.waits.clear()
        rows = [Row(rid, 1) for rid in rids]
        results, num_followed = worker.steps(*rows, num_steps=num_steps, on_begun=on_begun)
        memory = worker.loaded.memory
        return Ahead(
            [[row.token_id for row in result.rows] for result in results],
            [logprobs_of(result.rows) for result in results],
            num_followed,
            begin_waits,
            memory.snapshot(0),
            memory.violations(),
        )


def load_worker(
    model_dir: Path, device: Device | None, backend: str, **options: Any
) -> LoadedWorker:
    """With host memory that is filled, if it has room for all experts."""
    options = {"dtype": "float32"} | options
    if device is not None:
        options |= {"attention_backend": "triton"}
    if device is not None and backend != "disabled":
        options |= {
            "cuda_graph_backend_decode": backend,
            "cuda_graph_bs_decode": [2],
            "before_loading": lambda: record_graphs(device),
        }
    worker = LoadedWorker(model_dir, **options)
    if len(worker.loaded.tier.blocks) == len(worker.loaded.experts.store.experts()):
        wait_until(lambda: worker.loaded.tier.holds_all)  # its promoter fills it
    return worker


def spoil_padding(pool: Any) -> None:
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer[0].fill_(np.nan)


def prefill(worker: LoadedWorker, rid: str, prompt: list[int]) -> None:
    """In two chunks: the second attends to what the first has left in the arena."""
    worker.step(Row(rid, len(prompt) - 2))
    worker.step(Row(rid, 2))


def begin_step(device: Device | None) -> None:
    if device is not None:
        device.waits.clear()


def foresee(worker: LoadedWorker, rows: Sequence[RowResult], device: Device) -> None:
    """In this step have what the next layer will use brought in one by one before the step goes on: by the host where it has a
    layer's routing; in front of a layer's own letters where a graph computes it."""
    memory, numbers = worker.loaded.memory, worker.loaded.experts.layer_ids
    ids = [np.frombuffer(its.ids, np.int32).reshape(its.shape) for its in routed_of(rows)]

    def look_ahead(layer: int) -> None:
        if layer + 1 == len(numbers):
            return
        used = sorted({int(expert) for its in ids for expert in its[0, numbers[layer + 1]]})
        probabilities = np.zeros(memory.frame_table.shape)
        probabilities[layer + 1, used] = 1.0
        memory.expect(layer, probabilities)
        memory.prefetch([Wanted(layer + 1, expert, 1.0) for expert in used], 1)

    captured = worker.loaded.captured
    if captured is None:
        observer = SimpleNamespace(
            num_ahead=1, routed=lambda layer, _: look_ahead(layer), look_ahead=int
        )
    else:
        assert captured.letters is not None
        posted, layers = captured.letters.mailbox.posted, count()

        def before_kernel(name: str) -> None:
            if name != "commit_kernel":
                return
            before, begun = int(posted.sum()), memory.num_on_their_way
            look_ahead(next(layers))
            arriving = memory.num_on_their_way - begun
            wait_until(lambda: int(posted.sum()) == before + arriving)

        observer = SimpleNamespace(num_ahead=1, routed=lambda layer, its: None, look_ahead=int)
        device.before_kernel = before_kernel
    worker.loaded.experts.observer = observer


def logprobs_of(rows: Sequence[RowResult]) -> list[float | None]:
    """Of what the rows have sampled."""
    return [row.logprobs.logprob for row in rows if row.logprobs is not None]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def routed_of(rows: Sequence[RowResult]) -> list[Any]:
    return [row.routed_experts for row in rows if row.routed_experts is not None]
