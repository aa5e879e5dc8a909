"""Copies that end later: blocks stay pinned until then. On a CPU, with a stream that is made up.

Four blocks of host memory and 3 frames; experts are 6 bytes. What a CUDA device does with the copies
no test here shows.
"""

import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglmoe.memory.device_transfer import DeviceCopier, StreamCopier, page_lock
from sglmoe.memory.experts import Load
from sglmoe.memory.host_tier import HostTier
from sglmoe.memory.promotion import Promotion
from sglmoe.memory.store import PARTS, Bytes, ExpertReadError, ExpertStore


class Stream:
    """Notes what it is told. Hands out events and reaches them when told to."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log
        self.num_events = 0

    def new_event(self) -> "StreamEvent":
        self.num_events += 1
        return StreamEvent(self, self.num_events)

    def wait_stream(self, stream: "Stream") -> None:
        self.log.append(f"{self.name} waits for {stream.name}")

    def wait_event(self, event: "StreamEvent") -> None:
        self.log.append(f"{self.name} waits for {event.number}")

    def synchronize(self) -> None:
        self.log.append(f"{self.name} is done")


class StreamEvent:
    def __init__(self, stream: Stream, number: int) -> None:
        self._stream = stream
        self.number = number
        self.reached = True  # never recorded

    def record(self) -> None:
        self.reached = False
        self._stream.log.append(f"record {self.number}")

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        self._stream.log.append(f"the host waits for {self.number}")
        self.reached = True


class Bench:
    def __init__(self) -> None:
        self.store = ExpertStore()
        for expert in range(6):  # expert e is e, e, e, e, e, e
            for part in PARTS:
                self.store.put(0, expert, part, np.full(2, expert, np.uint8))
        self.tier = HostTier(np.zeros((4, 6), np.uint8), num_layers=1, num_experts=6)
        for expert in (0, 1):
            block = self.tier.begin(Promotion(0, expert))
            assert block is not None
            self.tier.finish(block, self.store.read(0, expert, self.tier.blocks[block]))
        self.log: list[str] = []
        self.stream, self.compute = Stream("demand", self.log), Stream("compute", self.log)
        self.locked: list[tuple[int, ...]] = []
        self.arena = torch.full((3 * 8,), 255, dtype=torch.uint8)
        self.copier = DeviceCopier(
            self.arena,
            frame_bytes=8,
            store=self.store,
            tier=self.tier,
            stream=self.stream,
            compute=self.compute,
            on_stream=lambda stream: nullcontext(),
            new_event=self.stream.new_event,
            lock_pages=self.lock_pages,
        )

    def lock_pages(self, blocks: Bytes) -> None:
        self.locked.append(blocks.shape)

    def pins(self) -> list[int]:
        assert self.tier.violations() == []
        return self.tier._pins.tolist()

    def reach(self) -> None:
        """The device has done all that was queued."""
        for event, _ in self.copier._copying:
            event.reached = True  # type: ignore[attr-defined]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_experts_come_from_host_memory_or_through_staging(bench: Bench) -> None:
    bench.copier.load([Load(2, 0, 1), Load(0, 0, 5)])
    frames = bench.arena.view(3, 8).tolist()
    assert frames == [[5] * 6 + [255] * 2, [255] * 8, [1] * 6 + [255] * 2]
    counters = bench.tier.counters()
    assert (counters["host_hits"], counters["disk_reads"], counters["disk_bytes"]) == (1, 1, 6)
    assert bench.locked == [(2, 6)]


def test_a_block_is_pinned_until_its_copy_is_done(bench: Bench) -> None:
    bench.copier.load([Load(0, 0, 0), Load(1, 0, 1)])
    assert bench.pins() == [1, 1, 0, 0]
    # Not done yet when the next layer asks: one more pin. Nobody may write into block 0.
    bench.copier.load([Load(2, 0, 0)])
    assert bench.pins() == [2, 1, 0, 0]
    bench.reach()
    bench.copier.load([])
    assert bench.pins() == [0, 0, 0, 0]


def test_a_staging_block_is_written_again_only_when_its_copy_is_done(bench: Bench) -> None:
    # Events 1 and 2 belong to the two staging blocks, event 3 to this load.
    bench.copier.load([Load(frame, 0, 2 + frame) for frame in range(3)])
    staged = [f"{what} {block}" for block in (1, 2, 1) for what in ("the host waits for", "record")]
    assert bench.log == ["demand waits for compute", *staged, "record 3"]


def test_what_computes_waits_for_the_copies_and_the_host_does_not(bench: Bench) -> None:
    finish = bench.copier.load([Load(0, 0, 0)])
    assert bench.log == ["demand waits for compute", "record 3"]
    finish()
    assert bench.log[2:] == ["compute waits for 3"]


def test_a_read_that_fails_leaves_pins_that_end_with_their_copies(bench: Bench) -> None:
    def fail(*_: object, **__: object) -> int:
        raise ExpertReadError("the disk is gone")

    bench.store.read = fail  # type: ignore[method-assign]
    with pytest.raises(ExpertReadError):
        bench.copier.load([Load(0, 0, 0), Load(1, 0, 4)])
    assert bench.pins() == [1, 0, 0, 0]
    assert bench.log[-2:] == ["record 3", "compute waits for 3"]  # the first copy is still to come
    bench.reach()
    bench.copier.load([])
    assert bench.pins() == [0, 0, 0, 0]


# ------------------------------------------------------------- prefetches, on a stream of their own


def prefetcher(bench: Bench, log: list[str]) -> StreamCopier:
    return StreamCopier(
        bench.arena,
        frame_bytes=8,
        store=bench.store,
        tier=bench.tier,
        stream=Stream("prefetch", log),
        on_stream=lambda stream: nullcontext(),
        new_event=bench.compute.new_event,
        lock_pages=bench.lock_pages,
    )


@pytest.mark.parametrize("expert", [1, 5], ids=["from host memory", "from the checkpoint"])
def test_a_prefetch_waits_for_what_may_read_the_frame_and_says_when_it_is_there(
    bench: Bench, expert: int
) -> None:
    """And for no more: the mark is set when the load is begun, before the layer queues its products."""
    log: list[str] = []
    copier = prefetcher(bench, log)
    mark = copier.mark()
    assert bench.log == ["record 1"]
    copier.copy(Load(2, 0, expert), mark, lambda: log.append("chunk"))
    assert bench.arena.view(3, 8)[2].tolist() == [expert] * 6 + [255] * 2
    assert log == ["prefetch waits for 1", *["chunk"] * (len(log) - 2), "prefetch is done"]
    assert bench.pins() == [0] * 4


def test_a_prefetch_that_is_given_up_leaves_no_pin(bench: Bench) -> None:
    def leave() -> None:
        raise InterruptedError

    copier = prefetcher(bench, [])
    with pytest.raises(InterruptedError):
        copier.copy(Load(2, 0, 1), copier.mark(), leave)
    assert bench.pins() == [0] * 4
    assert bench.arena.eq(255).all()


def test_two_threads_may_copy_at_a_time(bench: Bench) -> None:
    """A layer needs expert 5 while the thread is held up in the middle of expert 4: both come through staging."""
    copier = prefetcher(bench, [])
    held_up: list[str] = []

    def before_chunk() -> None:
        held_up.append("")
        if len(held_up) == 3:  # read in three parts; the first of them are in staging
            copier.copy(Load(1, 0, 5), copier.mark(), lambda: None)

    copier.copy(Load(0, 0, 4), copier.mark(), before_chunk)
    frames = bench.arena.view(3, 8)[:, :6].tolist()
    assert frames[:2] == [[4] * 6, [5] * 6]


def test_locked_memory_is_never_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA would go on to copy from its pages, whatever comes to lie at that address."""
    statuses = [0, 712]
    cudart = SimpleNamespace(cudaHostRegister=lambda *_: statuses.pop(0))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    locked, refused = np.zeros(4, np.uint8), np.zeros(4, np.uint8)
    alive = [weakref.ref(locked), weakref.ref(refused)]
    page_lock(locked)
    with pytest.raises(ValueError, match="--host-memory"):
        page_lock(refused)
    del locked, refused
    assert [its() is not None for its in alive] == [True, False]
