"""No race on a device, whatever comes in whatever order: the code that serves on CUDA, on streams that are simulated.

Memory manager, pager, prefetches, copiers, link gates, host memory and its promoter are the product's; `threading` and
torch.cuda are stand-ins that draw who goes on next and find races (`taken_turns.py`, `simulated_device.py`). Two layers of
four experts of 12 bytes, in chunks of 4; seven frames of two KV pages; three blocks of host memory. A kernel reads its
expert's frame, or a request's pages, and says whether it found what should be there.
"""

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import Device, Event, Range, Stream, bytes_of
from taken_turns import TakenTurns

from sglmoe.config import MemoryPolicy
from sglmoe.memory import background_copier, device_transfer, host_tier, link_gate, promoter, store
from sglmoe.memory.arena import Geometry
from sglmoe.memory.background_copier import BackgroundCopier
from sglmoe.memory.device_transfer import DeviceCopier, StreamCopier
from sglmoe.memory.host_tier import HostTier, block_bytes
from sglmoe.memory.link_gate import LinkGate
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.packed_order import NO_PACKING
from sglmoe.memory.prefetch import Wanted
from sglmoe.memory.promoter import Promoter
from sglmoe.memory.promotion import Promotion, TierSnapshot
from sglmoe.memory.store import PARTS, Bytes, ExpertReadError, ExpertStore

NUM_LAYERS, NUM_EXPERTS, PAGE_TOKENS = 2, 4, 4
GEOMETRY = Geometry(
    num_frames=7,
    frame_bytes=16,
    expert_bytes=12,
    page_bytes=8,
    page_tokens=PAGE_TOKENS,
    pages_per_frame=2,
    page_rows=4,
)
EXPERTS = [(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]


class Disk(ExpertStore):
    """Each expert is full of its number. Now and then it can't be read."""

    def __init__(self, fails: Callable[[], bool]):
        super().__init__()
        self._fails = fails
        for layer, expert in EXPERTS:
            for part in PARTS:
                self.put(layer, expert, part, np.full(4, expert_number(layer, expert), np.uint8))

    def read(
        self,
        layer: int,
        expert: int,
        target: Bytes,
        *,
        before_chunk: Callable[[], None] | None = None,
    ) -> int:
        self.fail_or_not()
        return super().read(layer, expert, target, before_chunk=before_chunk)

    def fail_or_not(self) -> None:
        if self._fails():
            raise ExpertReadError("the disk is gone")


def expert_number(layer: int, expert: int) -> int:
    return 10 * (layer + 1) + expert


class Server:
    """What the worker puts together on CUDA, and a forward pass that is only memory accesses."""

    def __init__(
        self, random: Random, make_stream: type[Stream] = Stream, make_event: type[Event] = Event
    ):
        self.random = random
        self.turns = TakenTurns(random)
        self.device = Device(self.turns, random.randrange, make_stream, make_event)
        self.disk = Disk(lambda: random.random() < 0.1)
        self.packing = NO_PACKING
        self.num_blocks = 3
        self.wrong: list[str] = []
        self.seen: Counter[str] = Counter()
        self._rids: dict[str, int] = {}

    def demand_frames(self, arena: torch.Tensor) -> dict[str, Any]:
        """What else the copiers get."""
        return {}

    def prefetch_frames(self, arena: torch.Tensor) -> dict[str, Any]:
        return {}

    def background_options(self, copier: StreamCopier) -> dict[str, Any]:
        return {"mark": copier.mark}

    def more_stand_ins(self) -> list[tuple[Any, str, Any]]:
        """Modules, names in them, and what is there instead."""
        return []

    def before_promoting(self) -> None:
        pass

    def between_steps(self) -> None:
        pass

    def build(self) -> None:
        device, disk = self.device, self.disk
        self.raw = torch.zeros(GEOMETRY.arena_bytes, dtype=torch.uint8)
        blocks = np.zeros((self.num_blocks, block_bytes(disk, as_stored=disk.is_packed)), np.uint8)
        device.lock_pages(blocks)
        self.tier = HostTier(
            blocks, num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, as_stored=disk.is_packed
        )
        demand = LinkGate()
        prefetch = LinkGate(above=demand)
        shared = {
            "frame_bytes": GEOMETRY.frame_bytes,
            "store": disk,
            "tier": self.tier,
            "on_stream": device.on_stream,
            "new_event": device.Event,
            "lock_pages": device.lock_pages,
        }
        arena = device.tensor(self.raw)
        loads = DeviceCopier(
            arena,
            stream=device.Stream("demand"),
            compute=device.default,
            **shared,
            **self.demand_frames(arena),
        )
        copier = StreamCopier(
            arena, stream=device.Stream("prefetch"), **shared, **self.prefetch_frames(arena)
        )
        self.background = BackgroundCopier(
            copier.copy, demand=demand, prefetch=prefetch, **self.background_options(copier)
        )
        self.memory = MemoryManager(
            GEOMETRY,
            num_layers=NUM_LAYERS,
            num_experts=NUM_EXPERTS,
            floor_frames=2,
            load_experts=demand.guard(loads.load),
            background=self.background,
            policy=MemoryPolicy.COST_AWARE,  # streams layers, too
            packing=self.packing,
        )
        self.promoter = Promoter(
            self.tier,
            disk,
            prefetch,
            heat=lambda: self.memory.expert_demand,
            residents=lambda: self.memory.frame_table >= 0,
        )
        self.before_promoting()
        self.promoter.start()

    def serve(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.between_steps()
            self.memory.begin_step(self.random.choice([1, 1000]))
            self.attend()
            self.run_layers()
            assert self.memory.violations() == []
        self.background.close()
        self.promoter.close()
        self.device.finish()
        snapshot, tier = self.memory.snapshot(0), self.tier.counters()
        self.seen["used"] += snapshot.prefetches_used
        self.seen["late"] += snapshot.prefetches_late
        self.seen["streamed"] += snapshot.experts_streamed
        self.seen["wasted"] += snapshot.prefetches_wasted
        self.seen["promoted"] += tier["host_promoted"]
        self.seen["evicted from host"] += tier["host_evicted"]
        self.seen["host hits"] += tier["host_hits"]
        self.seen["disk reads"] += tier["disk_reads"]

    def plan(self, snapshot: TierSnapshot, limit: int) -> list[Promotion]:
        """Stands in for `plan_promotions`, which would let most blocks be: anybody for anybody."""
        absent = [its for its in EXPERTS if not snapshot.is_here[its]]
        victims = [its for its in EXPERTS if snapshot.is_evictable[its]]
        if not victims or self.random.random() < 0.5:
            return [Promotion(*its) for its in absent[: snapshot.num_free]]
        return [Promotion(*self.random.choice(absent), victim=self.random.choice(victims))]

    # ------------------------------------------------------------------------------ a forward pass

    def run_layers(self) -> None:
        for layer in range(NUM_LAYERS):
            try:
                self.compute(layer)
            except ExpertReadError:
                self.seen["failed"] += 1

    def compute(self, layer: int) -> None:
        wanted = self.random.sample(range(NUM_EXPERTS), self.random.randint(1, NUM_EXPERTS))
        self.look_ahead(layer)
        for wave in self.memory.waves(layer, sorted(wanted)):
            for expert in wave.tolist():
                self.launch_expert(layer, expert, int(self.memory.frame_table[layer, expert]))
            self.look_ahead(layer)
            if self.random.random() < 0.1:
                return  # the pass is given up

    def launch_expert(self, layer: int, expert: int, frame: int) -> None:
        cells = self.raw.view(-1, GEOMETRY.frame_bytes)[frame, : GEOMETRY.expert_bytes]
        self.launch(f"kernel of {layer}.{expert}", cells, expert_number(layer, expert))

    def launch(self, what: str, cells: torch.Tensor, number: int) -> None:
        def check() -> None:
            if not cells.eq(number).all():
                self.wrong.append(f"{what} reads {cells.tolist()} for {number}")

        self.device.default.queue(what, check, reads=[bytes_of(cells)])

    def look_ahead(self, layer: int) -> None:
        if self.random.random() < 0.5:
            return
        probabilities = np.array([[self.random.random() for _ in range(4)] for _ in range(2)])
        self.memory.expect(layer, probabilities)
        likely = self.random.sample(EXPERTS, 3)
        self.memory.prefetch([Wanted(layer, expert, 0.9) for layer, expert in likely], 2)

    def attend(self) -> None:
        """A request comes, or goes on, or goes; each page is written by one kernel and read by the next."""
        for rid in list(self._rids):
            if self.random.random() < 0.4:
                self.memory.release(rid, b"", 0)
                del self._rids[rid]
        rid = f"r{self.random.random()}"
        self.memory.admit(rid, bytes(4), rid)
        if not self.memory.extend(rid, PAGE_TOKENS * self.random.randint(1, 3)):
            self.memory.release(rid, b"", 0)
        else:
            self._rids[rid] = self.random.randrange(100, 200)
        for rid, number in self._rids.items():
            for page in self.memory.pages(rid):
                cells = self.raw.view(-1, GEOMETRY.page_bytes)[page]
                self.device.default.queue(
                    f"KV of {rid}", lambda c=cells, n=number: c.fill_(n), writes=[bytes_of(cells)]
                )
                self.launch(f"attention of {rid}", cells, number)


@contextmanager
def stand_ins(server: Server) -> Generator[None, None, None]:
    """The product's modules see the server's threads, small chunks, and tell of host writes."""
    really_copy = store._copy

    def copy(part: store.Part, target: Bytes, start: int) -> None:
        server.device.host_writes(target)
        server.turns.turn()
        really_copy(part, target, start)

    with ExitStack() as stack:
        for module in (background_copier, host_tier, link_gate, promoter):
            stack.enter_context(patch.object(module, "threading", server.turns))
        stack.enter_context(patch.object(device_transfer, "queue", server.turns))
        for module in (store, device_transfer):
            stack.enter_context(patch.object(module, "CHUNK_BYTES", 4))
        stack.enter_context(patch.object(store, "_copy", copy))
        stack.enter_context(patch.object(promoter, "plan_promotions", server.plan))
        for where, name, instead in server.more_stand_ins():
            stack.enter_context(patch.object(where, name, instead))
        yield


def run(seed: int, kind: type[Server] = Server, **faults: type) -> Server:
    server = kind(Random(seed), **faults)
    with stand_ins(server):
        server.build()
        server.serve(num_steps=5)
    assert server.turns.failures == []
    return server


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_order_of_threads_and_streams_is_a_race(seed: int) -> None:
    server = run(seed)
    assert server.device.races == []
    assert server.wrong == []


def test_the_runs_meet_all_there_is_to_meet() -> None:
    seen: Counter[str] = Counter()
    for seed in range(60):
        server = run(seed)
        assert server.device.races == []
        seen += server.seen
    assert set(seen) == {
        "used",
        "late",
        "streamed",
        "wasted",
        "promoted",
        "evicted from host",
        "host hits",
        "disk reads",
        "failed",
    }


# ----------------------------------------------------------------- what would go wrong without each


class ForgetsToWait(Stream):
    """`wait_stream` and `wait_event` do nothing on the stream that is named."""

    forgetful = ""

    def wait_stream(self, stream: Stream) -> None:
        if self.name != self.forgetful:
            super().wait_stream(stream)

    def wait_event(self, event: Event) -> None:
        if self.name != self.forgetful:
            super().wait_event(event)


class ComputeForgets(ForgetsToWait):
    forgetful = "compute"


class DemandForgets(ForgetsToWait):
    forgetful = "demand"


class PrefetchForgets(ForgetsToWait):
    forgetful = "prefetch"


class IsImpatient(Stream):
    """The host does not wait for the stream."""

    def synchronize(self) -> None:
        pass


class Hasty(Event):
    """Nobody waits for the event."""

    def synchronize(self) -> None:
        pass


class Hopeful(Event):
    """The event says that it has been reached."""

    def query(self) -> bool:
        return True


@pytest.mark.parametrize(
    "fault",
    [
        {"make_stream": ComputeForgets},
        {"make_stream": DemandForgets},
        {"make_stream": PrefetchForgets},
        {"make_stream": IsImpatient},
        {"make_event": Hasty},
        {"make_event": Hopeful},
    ],
    ids=lambda fault: next(iter(fault.values())).__name__,
)
def test_without_an_event_there_is_a_race(fault: dict[str, type]) -> None:
    assert any(run(seed, **fault).device.races for seed in range(60))


# ------------------------------------------------------------------------ the finder of races itself


def device(seed: int = 0) -> Device:
    random = Random(seed)
    return Device(TakenTurns(random), random.randrange)


PLACE = Range(0, 8)


def test_two_streams_race_unless_one_waits() -> None:
    its = device()
    other = its.Stream("other")
    its.default.queue("write", lambda: None, writes=[PLACE])
    other.queue("read", lambda: None, reads=[Range(4, 5)])
    assert its.races == ["read on other races with write on compute"]


@pytest.mark.parametrize("waits", ["stream", "host"])
def test_waiting_is_no_race(waits: str) -> None:
    its = device()
    other = its.Stream("other")
    its.default.queue("write", lambda: None, writes=[PLACE])
    if waits == "stream":
        other.wait_stream(its.default)
    else:
        its.default.synchronize()
    other.queue("read", lambda: None, reads=[PLACE])
    assert its.races == []


def test_an_event_says_nothing_of_what_was_queued_behind_it() -> None:
    its = device()
    other, event = its.Stream("other"), its.Event()
    event.record()
    its.default.queue("write", lambda: None, writes=[PLACE])
    other.wait_event(event)
    other.queue("read", lambda: None, reads=[PLACE])
    assert len(its.races) == 1


def test_reads_do_not_race() -> None:
    its = device()
    its.default.queue("read", lambda: None, reads=[PLACE])
    its.Stream("other").queue("read", lambda: None, reads=[PLACE])
    assert its.races == []
