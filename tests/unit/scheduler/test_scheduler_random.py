"""Random lives of requests against a worker that takes every word literally.

Whatever is added, aborted, paused, preempted or rejected, and whenever workers die: each request ends
exactly once, with its tokens in order, and no worker is told of a request it does not know. Requests
that kill their worker fail, and no others do.
"""

import asyncio
import random
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from sglmoe.protocol import (
    PROTOCOL_VERSION,
    AddRequests,
    FromWorker,
    Limits,
    MemorySnapshot,
    NewRequest,
    RequestReady,
    RowResult,
    StepCosts,
    StepPlan,
    StepResult,
    ToWorker,
    WorkerFailed,
    WorkerReady,
)
from sglmoe.scheduler import recovery
from sglmoe.scheduler.finish import StopRules, aborted
from sglmoe.scheduler.policy import Order, PolicySettings
from sglmoe.scheduler.report import Restarts, StepReport
from sglmoe.scheduler.request import Request
from sglmoe.scheduler.scheduler import Scheduler
from sglmoe.scheduler.seams import WorkerLost
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


# Tokens of a prompt that kill: when its grammar is compiled, and when its third token would be computed.
KILLS_COMPILER, KILLS_STEP = 8, 9
WITH_GRAMMAR = b"grammar"


class LiteralWorker:
    """Holds pages, serves rows in order, and trips over anything it was not told before.

    Dies of pills. Dies by chance too, at any point, but not so often that a request could be blamed for it.
    """

    def __init__(self, rng: random.Random, *, death_rate: float) -> None:
        self._rng = rng
        self._death_rate = death_rate
        self._specs: dict[str, NewRequest] = {}
        self._num_outputs: dict[str, int] = {}
        self._computed: dict[str, int] = {}  # of those that hold memory
        self._inbox: asyncio.Queue[ToWorker] = asyncio.Queue()
        self._outbox: list[FromWorker] = []
        self._is_dead = False
        self.may_die = lambda: True
        self.num_deaths = self.num_failed_starts = 0
        self.last_begun = -1

    def send(self, message: ToWorker) -> None:
        self._inbox.put_nowait(message)

    def kill(self, cause: str) -> None:
        raise AssertionError(f"no clock ticks here, and yet {cause}")

    async def replace(self, *, silence_seconds: float | None) -> WorkerReady:
        self._specs, self._num_outputs, self._computed = {}, {}, {}
        self._inbox, self._outbox, self.last_begun = asyncio.Queue(), [], -1
        await self._take_time(20)
        if self._rng.random() < 0.2 and self.may_die():
            self.num_failed_starts += 1
            raise WorkerLost("no such luck")
        self._is_dead = False
        return WorkerReady(PROTOCOL_VERSION, LIMITS, self.snapshot(-1), 0.0, "")

    async def receive(self) -> FromWorker:
        while not self._outbox:
            message = await self._inbox.get()
            await self._take_time(4)
            if self._struck_by_chance():
                return self._die()
            match message:
                case AddRequests(requests):
                    for spec in requests:
                        self._add(spec)
                case StepPlan() as plan:
                    self.last_begun = plan.step_id
                    self._outbox.append(self._step(plan))
            if self._is_dead or self._struck_by_chance():  # its answer is lost
                return self._die()
        return self._outbox.pop(0)

    async def _take_time(self, most: int) -> None:
        for _ in range(self._rng.randrange(most)):
            await asyncio.sleep(0)

    def _struck_by_chance(self) -> bool:
        return self._rng.random() < self._death_rate and self.may_die()

    def _die(self) -> WorkerFailed:
        self.num_deaths += 1
        return WorkerFailed("bad luck")

    def _add(self, spec: NewRequest) -> None:
        assert spec.rid not in self._specs
        self._specs[spec.rid] = spec
        self._num_outputs[spec.rid] = len(spec.output_ids) // 4
        if kind_of(spec) == KILLS_COMPILER:
            self._is_dead = True
        elif spec.sampling == WITH_GRAMMAR:
            self._outbox.append(RequestReady(spec.rid))

    def snapshot(self, step_id: int) -> MemorySnapshot:
        return msgspec.structs.replace(
            NO_MEMORY,
            step_id=step_id,
            total_pages=NUM_PAGES,
            locked_pages=self._locked(),
            page_tokens=PAGE_TOKENS,
            costs=StepCosts(stream_seconds=1.0),
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
        self._is_dead |= kind_of(self._specs[rid]) == KILLS_STEP and new >= 3
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


def kind_of(request: NewRequest | Request) -> int:
    """The first token of its prompt, which says whether it kills."""
    return array("i", request.prompt_ids)[0]


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

    def worker_replaced(self, ready: WorkerReady, restarts: Restarts) -> None:
        pass


async def live(seed: int, *, death_rate: float = 0.0, pill_rate: float = 0.0) -> LiteralWorker:
    rng = random.Random(seed)
    worker, ends = LiteralWorker(rng, death_rate=death_rate), Ends()
    orders: list[Order] = ["fcfs", "lpm", "lof", "random"]
    policy = PolicySettings(
        max_running=8,
        max_prefill_tokens=16,
        chunk_tokens=rng.choice([None, 3, 8]),
        order=rng.choice(orders),
        mix_decode=rng.random() < 0.5,
        preemption_threshold=rng.choice([None, 0]),
        expert_affinity=rng.random() < 0.5,
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
    worker.may_die = lambda: (
        not scheduler.recovery._num_in_vain
        and all(request.num_deaths < 2 for request in scheduler.roster.live.values())
    )
    serving = asyncio.create_task(scheduler.run())
    requests: list[Request] = []
    for _ in range(60):
        requests += disturb(scheduler, rng, num_known=len(requests), pill_rate=pill_rate)
        for _ in range(rng.randrange(12)):
            await asyncio.sleep(0)
    scheduler.resume()
    for _ in range(100_000):
        settled = scheduler.planner.settled and not scheduler.recovery.is_under_way
        if len(ends.ended) == len(requests) and settled:
            break
        if serving.done():
            serving.result()
        await asyncio.sleep(0)
    serving.cancel()
    check(requests, ends.ended, worker)
    return worker


def disturb(
    scheduler: Scheduler, rng: random.Random, *, num_known: int, pill_rate: float
) -> list[Request]:
    """One random thing that a client or an operator may do."""
    dice = rng.random()
    if dice < 0.6:
        request = random_request(rng, num_known, pill_rate=pill_rate)
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


def random_request(rng: random.Random, num_known: int, *, pill_rate: float) -> Request:
    # Few names, so that they are used again while their last bearers leave.
    rid = str(rng.randrange(num_known + 1)) if rng.random() < 0.3 else str(num_known)
    num_prompt = rng.randrange(1, 30)
    rules = StopRules(
        max_new_tokens=rng.randrange(0, 20),
        vocab_size=1000,
        token_ids=frozenset({rng.randrange(40)}),
    )
    prompt_ids = array("q", [7, *rng.choices(range(8, 12), k=num_prompt - 1)])
    if rng.random() < pill_rate:
        prompt_ids[0] = rng.choice([KILLS_COMPILER, KILLS_STEP])
    has_grammar = prompt_ids[0] == KILLS_COMPILER or rng.random() < 0.3
    return Request(
        rid=rid,
        prompt_ids=prompt_ids,
        stop=rules,
        sampling=WITH_GRAMMAR if has_grammar else b"",
        has_grammar=has_grammar,
        priority=rng.randrange(3),
    )


def check(requests: Sequence[Request], ended: Sequence[Request], worker: Any) -> None:
    assert sorted(map(id, ended)) == sorted(map(id, requests)), "each request ends exactly once"
    for request in requests:
        assert request.finish is not None
        if request.finish.status == 500:
            assert kind_of(request) in (KILLS_COMPILER, KILLS_STEP), "an innocent is failed"
        elif request.finish.kind != "abort":
            harmless = kind_of(request) == KILLS_STEP and request.num_tokens <= 3
            assert kind_of(request) == 7 or harmless, "a pill has been swallowed"
        if request.finish.kind == "length":
            assert request.num_output_tokens == request.stop.max_new_tokens
        if request.finish.kind == "stop":
            assert request.output_ids[-1] in request.stop.token_ids
    assert worker._specs == {}, "the worker was told to forget everyone"


@pytest.mark.parametrize("seed", range(25))
def test_any_life_ends_well(seed: int) -> None:
    asyncio.run(live(seed))


@pytest.mark.parametrize("seed", range(25))
def test_any_life_ends_well_whenever_workers_die(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "PAUSE_SECONDS", 0.0)
    worker = asyncio.run(live(seed, death_rate=0.05))
    assert worker.num_deaths > 3


@pytest.mark.parametrize("seed", range(25))
def test_pills_and_nobody_else_are_failed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "PAUSE_SECONDS", 0.0)
    worker = asyncio.run(live(seed, death_rate=0.02, pill_rate=0.2))
    assert worker.num_deaths > 3
