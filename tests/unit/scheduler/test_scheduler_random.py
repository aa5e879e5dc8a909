"""Random lives of requests against a worker that takes every word literally.

Whatever is added, aborted, paused, preempted or rejected: each request ends exactly once, with its
tokens in order, and the worker is never told of a request it does not know.
"""

import asyncio
import random
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from sglmoe.protocol import (
    AddRequests,
    FromWorker,
    Limits,
    MemorySnapshot,
    NewRequest,
    RowResult,
    StepPlan,
    StepResult,
    ToWorker,
)
from sglmoe.scheduler.finish import StopRules, aborted
from sglmoe.scheduler.policy import Order, PolicySettings
from sglmoe.scheduler.report import StepReport
from sglmoe.scheduler.request import Request
from sglmoe.scheduler.scheduler import Scheduler
from sglmoe.scheduler.settings import SchedulerSettings
from sglmoe.units import ceil_div

PAGE_TOKENS, NUM_PAGES, MAX_ROWS = 4, 14, 5
LIMITS = Limits(
    total_tokens=NUM_PAGES * PAGE_TOKENS,
    page_tokens=PAGE_TOKENS,
    max_running=MAX_ROWS,
    context_tokens=100,
    vocab_size=1000,
)

NO_MEMORY = MemorySnapshot(*[0] * sum(f.required for f in msgspec.structs.fields(MemorySnapshot)))


class LiteralWorker:
    """Holds pages, serves rows in order, and trips over anything it was not told before."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._specs: dict[str, NewRequest] = {}
        self._num_outputs: dict[str, int] = {}
        self._computed: dict[str, int] = {}  # of those that hold memory
        self._inbox: asyncio.Queue[ToWorker] = asyncio.Queue()

    async def send(self, message: ToWorker) -> None:
        self._inbox.put_nowait(message)

    async def receive(self) -> FromWorker:
        while True:
            message = await self._inbox.get()
            match message:
                case AddRequests(requests):
                    for spec in requests:
                        assert spec.rid not in self._specs
                        self._specs[spec.rid] = spec
                        self._num_outputs[spec.rid] = 0
                case StepPlan() as plan:
                    for _ in range(self._rng.randrange(4)):  # takes its time
                        await asyncio.sleep(0)
                    return self._step(plan)

    def snapshot(self, step_id: int) -> MemorySnapshot:
        return msgspec.structs.replace(
            NO_MEMORY,
            step_id=step_id,
            total_pages=NUM_PAGES,
            locked_pages=self._locked(),
            page_tokens=PAGE_TOKENS,
        )

    def _locked(self) -> int:
        return sum(ceil_div(computed, PAGE_TOKENS) for computed in self._computed.values())

    def _step(self, plan: StepPlan) -> StepResult:
        for rid in plan.drop:
            del self._specs[rid], self._num_outputs[rid]
            self._computed.pop(rid, None)
        for rid in plan.preempt:
            assert rid in self._specs
            self._computed.pop(rid, None)
        rows, rejected = [], []
        for row in plan.rows:
            result = self._advance(row.rid, row.num_tokens)
            if result is None:
                rejected.append(row.rid)
            else:
                rows.append(result)
        return StepResult(
            step_id=plan.step_id,
            rows=tuple(rows),
            rejected=tuple(rejected),
            failed=(),
            cached_tokens={rid: 0 for rid in plan.probe if rid in self._specs},
            snapshot=self.snapshot(plan.step_id),
            step_seconds=0.0,
        )

    def _advance(self, rid: str, num_tokens: int) -> RowResult | None:
        total = len(self._specs[rid].prompt_ids) // 4 + self._num_outputs[rid]
        old = self._computed.get(rid, 0)
        new = min(old + num_tokens, total)
        growth = ceil_div(new, PAGE_TOKENS) - ceil_div(old, PAGE_TOKENS)
        no_row_free = rid not in self._computed and len(self._computed) == MAX_ROWS
        if growth > NUM_PAGES - self._locked() or no_row_free:
            self._computed.pop(rid, None)
            return None
        self._computed[rid] = new
        token_id = None
        if new == total:
            token_id = self._num_outputs[rid]  # tokens count up, so that order shows
            self._num_outputs[rid] += 1
        return RowResult(rid=rid, num_computed=new, num_cached=0, token_id=token_id)


class Ends:
    """How requests ended; twice is an error."""

    def __init__(self) -> None:
        self.ended: list[Request] = []

    async def publish(self, requests: Sequence[Request]) -> None:
        for request in requests:
            assert request.output_ids.tolist() == list(range(len(request.output_ids)))
            if request.finished:
                self.ended.append(request)

    async def refuse(self, requests: Sequence[Request]) -> None:
        self.ended += requests

    def step_done(self, report: StepReport) -> None:
        pass


async def live(seed: int) -> None:
    rng = random.Random(seed)
    worker, ends = LiteralWorker(rng), Ends()
    orders: list[Order] = ["fcfs", "lpm", "lof", "random"]
    policy = PolicySettings(
        max_running=8,
        max_prefill_tokens=16,
        chunk_tokens=rng.choice([None, 3, 8]),
        order=rng.choice(orders),
        mix_decode=rng.random() < 0.5,
        preemption_threshold=rng.choice([None, 0]),
    )
    scheduler = Scheduler(
        worker=worker,
        outputs=ends,
        limits=LIMITS,
        snapshot=worker.snapshot(-1),
        settings=SchedulerSettings(
            policy=policy,
            use_priority=True,
            max_queued=20,
            new_token_ratio=rng.choice([0.0, 0.7]),
            min_new_token_ratio=0.0,
        ),
        decode=lambda _: "",
        clock=lambda: 0.0,
    )
    serving = asyncio.create_task(scheduler.run())
    requests: list[Request] = []
    for _ in range(60):
        requests += disturb(scheduler, rng, num_known=len(requests))
        for _ in range(rng.randrange(12)):
            await asyncio.sleep(0)
    scheduler.resume()
    for _ in range(100_000):
        if len(ends.ended) == len(requests) and scheduler.planner.settled:
            break
        if serving.done():
            serving.result()
        await asyncio.sleep(0)
    serving.cancel()
    check(requests, ends.ended, worker)


def disturb(scheduler: Scheduler, rng: random.Random, *, num_known: int) -> list[Request]:
    """One random thing that a client or an operator may do."""
    dice = rng.random()
    if dice < 0.6:
        request = random_request(rng, num_known)
        scheduler.add(request)
        return [request]
    if dice < 0.75:
        rid = str(rng.randrange(num_known + 1))
        scheduler.abort(lambda request: request.rid == rid, aborted("Aborted"))
    elif dice < 0.85:
        scheduler.pause(retract=rng.random() < 0.5)
    else:
        scheduler.resume()
    return []


def random_request(rng: random.Random, num_known: int) -> Request:
    # Few names, so that they are used again while their last bearers leave.
    rid = str(rng.randrange(num_known + 1)) if rng.random() < 0.3 else str(num_known)
    num_prompt = rng.randrange(1, 30)
    rules = StopRules(
        max_new_tokens=rng.randrange(0, 20),
        vocab_size=1000,
        token_ids=frozenset({rng.randrange(40)}),
    )
    prompt_ids = array("q", [7] * num_prompt)
    return Request(rid=rid, prompt_ids=prompt_ids, stop=rules, priority=rng.randrange(3))


def check(requests: Sequence[Request], ended: Sequence[Request], worker: Any) -> None:
    assert sorted(map(id, ended)) == sorted(map(id, requests)), "each request ends exactly once"
    for request in requests:
        assert request.finish is not None
        if request.finish.kind == "length":
            assert request.num_output_tokens == request.stop.max_new_tokens
        if request.finish.kind == "stop":
            assert request.output_ids[-1] in request.stop.token_ids
    assert worker._specs == {}, "the worker was told to forget everyone"


@pytest.mark.parametrize("seed", range(25))
def test_any_life_ends_well(seed: int) -> None:
    asyncio.run(live(seed))
