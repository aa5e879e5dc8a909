"""Every admitted request finishes, whatever the order, under the tightest arena there is.

The scheduler drives a real worker on a real memory; only tensors are missing. The arena has 4 frames of
one expert or 2 pages of 4 tokens. One is kept for experts, so KV has 24 tokens. Every request fits into
these alone, no two do when they have grown; each layer needs up to 4 experts and gets one at a time
when KV has all the rest.
"""

import asyncio
import random
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Geometry
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.packed_order import NO_PACKING, Packing
from sglmoe.protocol import (
    AddRequests,
    FromWorker,
    Limits,
    PackedReport,
    ResidencyPlan,
    StepCosts,
    StepPlan,
    ToWorker,
    WorkerReady,
)
from sglmoe.scheduler.finish import StopRules
from sglmoe.scheduler.policy import Order, PolicySettings
from sglmoe.scheduler.report import Restarts, StepReport
from sglmoe.scheduler.request import Request
from sglmoe.scheduler.scheduler import Scheduler
from sglmoe.scheduler.settings import SchedulerSettings
from sglmoe.worker.request import BatchRow
from sglmoe.worker.seams import Done, Pass, RowOutput
from sglmoe.worker.step_watch import StepCost
from sglmoe.worker.worker import Worker

NUM_LAYERS, NUM_EXPERTS = 2, 4
GEOMETRY = Geometry(
    num_frames=4,
    frame_bytes=100,
    expert_bytes=100,
    page_bytes=50,
    page_tokens=4,
    pages_per_frame=2,
    page_rows=24,
)
KV_TOKENS = 24
LIMITS = Limits(
    total_tokens=KV_TOKENS, page_tokens=4, max_running=6, context_tokens=100, vocab_size=1000
)


class RoutingModel:
    """Asks for random experts in every layer, and samples how many tokens it has seen."""

    num_behind = 0

    def __init__(self, memory: MemoryManager, rng: random.Random) -> None:
        self._memory = memory
        self._rng = rng
        self.num_waves = 0

    def write_token_ids(self, table_row: int, start: int, token_ids: np.ndarray) -> None:
        pass

    def write_decode_ids(self, *_: Sequence[int]) -> None:
        pass

    def begin(self, rows: Sequence[BatchRow]) -> Pass:
        for layer in range(NUM_LAYERS):
            used = self._rng.sample(range(NUM_EXPERTS), self._rng.randint(1, NUM_EXPERTS))
            seen: list[int] = []
            for wave in self._memory.waves(layer, used):
                assert (self._memory.frame_table[layer, wave] >= 0).all()
                assert self._memory.violations() == []
                seen += wave.tolist()
                self.num_waves += 1
            assert sorted(seen) == sorted(used)
        return Done([RowOutput(token_id=row.stop if row.samples else None) for row in rows])

    def forget(self, rid: str) -> None:
        pass


class AnyLimit:
    """In place of a planner: whatever limit comes out, nobody may be stuck for it."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def step_done(self, *_: Any) -> ResidencyPlan:
        return ResidencyPlan(running_limit=self._rng.choice([None, 1, 2, 3]))


class AnyPacking:
    """In place of another: whoever is to be packed in however many frames, nobody may be stuck for it."""

    def __init__(self, memory: MemoryManager, rng: random.Random) -> None:
        self._memory = memory
        self._rng = rng
        self.most_frames = 0

    def step_done(self, *_: Any) -> PackedReport:
        if self._rng.random() < 0.3:
            experts = [(layer, e) for layer in range(NUM_LAYERS) for e in range(NUM_EXPERTS)]
            wanted = self._rng.sample(experts, self._rng.randint(0, len(experts)))
            self._memory.pack(self._rng.randint(0, GEOMETRY.num_frames), wanted)
            assert self._memory.violations() == []
        self.most_frames = max(self.most_frames, self._memory.snapshot(0).packed_frames)
        return PackedReport()


class Unwatched:
    """In place of what measures steps."""

    def step_done(self, *_: Any) -> StepCost:
        return StepCost(0.0, 0.0, 0)

    def new_price(self) -> None:
        return None

    def costs(self, _: Any) -> StepCosts:
        return StepCosts()


class WorkerLine:
    """A worker behind a line, in this process."""

    def __init__(
        self, rng: random.Random, *, on_step: Callable[[], None], packs: bool = False
    ) -> None:
        packing = Packing(GEOMETRY.frame_bytes * 7 // 10, lambda: rng.random())
        self.memory = MemoryManager(
            GEOMETRY,
            num_layers=NUM_LAYERS,
            num_experts=NUM_EXPERTS,
            floor_frames=1,
            load_experts=lambda loads: None,
            policy=MemoryPolicy.COST_AWARE if packs else MemoryPolicy.LRU,
            packing=packing if packs else NO_PACKING,
        )
        self.packing = AnyPacking(self.memory, rng)
        self.model = RoutingModel(self.memory, rng)
        self._worker = Worker(
            memory=self.memory,
            model=self.model,
            max_running=LIMITS.max_running,
            watch=Unwatched(),  # type: ignore[arg-type]
            planner=AnyLimit(rng),  # type: ignore[arg-type]
            packed=self.packing if packs else None,  # type: ignore[arg-type]
        )
        self.last_begun = -1
        self._inbox: asyncio.Queue[ToWorker] = asyncio.Queue()
        self._on_step = on_step
        self.num_steps = self.num_rejected = 0

    def send(self, message: ToWorker) -> None:
        self._inbox.put_nowait(message)

    def kill(self, cause: str) -> None:
        raise AssertionError(cause)

    async def replace(self, *, silence_seconds: float | None) -> WorkerReady:
        raise AssertionError("nobody dies here")

    async def receive(self) -> FromWorker:
        while True:
            match await self._inbox.get():
                case AddRequests(requests):
                    for spec in requests:
                        self._worker.add(spec)
                case StepPlan() as plan:
                    result = self._worker.step(plan)
                    assert self.memory.violations() == []
                    self.num_steps += 1
                    self.num_rejected += len(result.rejected)
                    self._on_step()
                    return result


class Ends:
    """How requests ended."""

    def __init__(self) -> None:
        self.ended: list[Request] = []

    async def publish(self, requests: Sequence[Request]) -> None:
        self.ended += [request for request in requests if request.finished]

    async def refuse(self, requests: Sequence[Request]) -> None:
        raise AssertionError(f"{[(r.rid, r.finish) for r in requests]} were refused")

    def step_done(self, report: StepReport) -> None:
        pass

    def worker_replaced(self, ready: WorkerReady, restarts: Restarts) -> None:
        raise AssertionError("nobody dies here")


def request(rid: str, *, num_prompt: int, max_new_tokens: int) -> Request:
    """A prompt of its own that runs as long as it may."""
    prompt = array("q", [int(rid) % 1000, *range(1, num_prompt)])
    return Request(
        rid=rid, prompt_ids=prompt, stop=StopRules(max_new_tokens=max_new_tokens, vocab_size=1000)
    )


def make_scheduler(line: WorkerLine, ends: Ends, **policy: Any) -> Scheduler:
    return Scheduler(
        worker=line,
        outputs=ends,
        limits=LIMITS,
        snapshot=line.memory.snapshot(-1),
        # The most reckless: running requests are expected to ask for nothing more.
        settings=SchedulerSettings(
            policy=PolicySettings(max_running=6, max_prefill_tokens=30, **policy),
            new_token_ratio=0.0,
            min_new_token_ratio=0.0,
        ),
        decode=lambda _: "",
        clock=lambda: 0.0,
    )


async def serve_until(scheduler: Scheduler, done: Callable[[], bool]) -> None:
    serving = asyncio.create_task(scheduler.run())
    while not done():
        if serving.done():
            serving.result()
        await asyncio.sleep(0)
    serving.cancel()


async def crowd(seed: int, *, packs: bool = False) -> WorkerLine:
    """20 requests at random times, each more than half of what KV has."""
    rng = random.Random(seed)
    wanted: list[Request] = []
    for number in range(20):
        num_prompt = rng.randint(1, KV_TOKENS - 1)
        fewest, most = max(1, KV_TOKENS // 2 + 1 - num_prompt), KV_TOKENS - num_prompt
        max_new_tokens = rng.randint(fewest, most)
        wanted.append(request(str(number), num_prompt=num_prompt, max_new_tokens=max_new_tokens))
    coming = list(wanted)

    def add_some() -> None:
        # Far more steps than tokens: all the others may have to compute again what they lost.
        assert line.num_steps < 100 * len(wanted), "they get in each other's way for ever"
        while coming and rng.random() < 0.4:
            scheduler.add(coming.pop(0))

    line, ends = WorkerLine(rng, on_step=add_some, packs=packs), Ends()
    orders: list[Order] = ["fcfs", "lpm", "lof", "random"]
    scheduler = make_scheduler(
        line,
        ends,
        chunk_tokens=rng.choice([None, 3, 8]),
        order=rng.choice(orders),
        mix_decode=rng.random() < 0.5,
    )
    scheduler.add(coming.pop(0))

    def done() -> bool:
        if coming and not scheduler.roster.live:
            scheduler.add(coming.pop(0))
        return len(ends.ended) == len(wanted) and scheduler.planner.settled

    await serve_until(scheduler, done)
    assert {r.rid: len(r.output_ids) for r in ends.ended} == {
        r.rid: r.stop.max_new_tokens for r in wanted
    }
    assert {r.finish.kind for r in ends.ended if r.finish} == {"length"}
    assert line.memory.snapshot(0).locked_pages == 0
    return line


def test_requests_that_never_fit_together_all_finish() -> None:
    lines = [asyncio.run(crowd(seed)) for seed in range(25)]
    # That was no idle talk: memory ran out, and layers took several waves.
    assert sum(line.num_rejected for line in lines) > 25
    assert all(line.memory.snapshot(0).num_split_layers > 20 for line in lines)


def test_packed_experts_are_in_nobodys_way() -> None:
    lines = [asyncio.run(crowd(seed, packs=True)) for seed in range(6)]
    assert sum(line.num_rejected for line in lines) > 0
    assert all(line.packing.most_frames > 1 for line in lines)


async def stream(*, num_small: int) -> tuple[int, int]:
    """One large request among small ones that never cease to come: (when it came, when it ended),
    in steps."""
    rng = random.Random(0)
    num_added = 0

    def add_two() -> None:
        nonlocal num_added
        for _ in range(2):
            if num_added < num_small:
                scheduler.add(request(str(100 + num_added), num_prompt=3, max_new_tokens=3))
                num_added += 1

    line, ends = WorkerLine(rng, on_step=add_two), Ends()
    scheduler = make_scheduler(line, ends)
    add_two()
    scheduler.add(request("1", num_prompt=20, max_new_tokens=4))

    def done() -> bool:
        assert num_added < num_small, "the large request starves"
        return any(r.rid == "1" for r in ends.ended)

    await serve_until(scheduler, done)
    return line.num_steps, len(ends.ended)


def test_a_large_request_does_not_starve_among_small_ones() -> None:
    num_steps, num_ended = asyncio.run(stream(num_small=2000))
    # Two small ones came before it; it runs alone, 4 steps, when they are done.
    assert num_steps < 30
    assert num_ended < 20


@pytest.mark.parametrize("num_tokens", [KV_TOKENS, KV_TOKENS + 1])
def test_the_limit_that_requests_are_refused_by_is_exact(num_tokens: int) -> None:
    """`frontend_request` refuses what is longer than `Limits.total_tokens`: all frames but the floor."""
    line = WorkerLine(random.Random(0), on_step=lambda: None)
    snapshot = line.memory.snapshot(0)
    assert snapshot.total_pages * snapshot.page_tokens == KV_TOKENS
    line.memory.admit("a", bytes(4 * num_tokens), "")
    assert line.memory.extend("a", num_tokens) == (num_tokens <= KV_TOKENS)
