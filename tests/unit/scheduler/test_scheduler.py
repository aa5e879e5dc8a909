"""The scheduler against a scripted worker: every plan is seen, every answer written by hand.

Pages hold 4 tokens. A prompt of n tokens is 0..n-1. No clock ticks but the one in the test.
"""

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from sglmoe.protocol import (
    AddRequests,
    CallDone,
    FlushCache,
    FromWorker,
    Limits,
    MemorySnapshot,
    NewRequest,
    RequestReady,
    Row,
    RowFailure,
    RowResult,
    ShowMemory,
    StepPlan,
    StepResult,
    ToWorker,
    WorkerFailed,
    WorkerReady,
)
from sglmoe.scheduler.finish import StopRules, aborted
from sglmoe.scheduler.policy import PolicySettings
from sglmoe.scheduler.report import Restarts, StepReport
from sglmoe.scheduler.request import Request, State
from sglmoe.scheduler.scheduler import Scheduler
from sglmoe.scheduler.seams import WorkerLost
from sglmoe.scheduler.settings import SchedulerSettings

LIMITS = Limits(total_tokens=80, page_tokens=4, max_running=8, context_tokens=64, vocab_size=100)
NO_MEMORY = MemorySnapshot(*[0] * sum(f.required for f in msgspec.structs.fields(MemorySnapshot)))


def snapshot(*, available_pages: int = 20) -> MemorySnapshot:
    return msgspec.structs.replace(NO_MEMORY, total_pages=available_pages, page_tokens=4)


class Channel:
    """The line to the worker: `plans` and `announced` are what it was sent, `say` is its voice.

    When it has died, whatever is put into `births` comes in its place, and is sent everything anew.
    """

    def __init__(self) -> None:
        self.last_begun = -1
        self.plans: list[StepPlan] = []
        self.announced: list[NewRequest] = []
        self.calls: list[FlushCache | ShowMemory] = []
        self.births: asyncio.Queue[WorkerReady | WorkerLost] = asyncio.Queue()
        self._voice: asyncio.Queue[FromWorker] = asyncio.Queue()

    @property
    def added(self) -> list[str]:
        return [request.rid for request in self.announced]

    def kill(self, cause: str) -> None:
        self.say(WorkerFailed(cause))

    async def replace(self, *, silence_seconds: float | None) -> WorkerReady:
        born = await self.births.get()
        if isinstance(born, WorkerLost):
            raise born
        self.plans, self.announced, self.last_begun = [], [], -1
        return born

    def send(self, message: ToWorker) -> None:
        match message:
            case StepPlan():
                self.plans.append(message)
            case AddRequests(requests):
                self.announced += requests
            case FlushCache() | ShowMemory():
                self.calls.append(message)

    async def receive(self) -> FromWorker:
        return await self._voice.get()

    def say(self, message: FromWorker) -> None:
        self._voice.put_nowait(message)


class Client:
    """Where results go: text by rid, and how each request ended."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[int]] = {}
        self.ends: dict[str, Any] = {}
        self.refused: dict[str, Any] = {}
        self.reports: list[StepReport] = []
        self.restarts: list[Restarts] = []

    async def publish(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.outputs[request.rid] = request.output_ids.tolist()
            if request.finish:
                self.ends[request.rid] = request.finish

    async def refuse(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.refused[request.rid] = request.finish

    def step_done(self, report: StepReport) -> None:
        self.reports.append(report)

    def worker_replaced(self, ready: WorkerReady, restarts: Restarts) -> None:
        self.restarts.append(restarts)


class Stage:
    """A running scheduler, a worker's line, a client and a clock."""

    def __init__(self, **settings: Any) -> None:
        self.channel = Channel()
        self.client = Client()
        self.now = 100.0
        policy = PolicySettings(max_running=4, max_prefill_tokens=100, chunk_tokens=8)
        self.scheduler = Scheduler(
            worker=self.channel,
            outputs=self.client,
            limits=LIMITS,
            snapshot=snapshot(),
            settings=SchedulerSettings(**{"policy": policy, "new_token_ratio": 0.0} | settings),
            decode=lambda token_ids: "".join(chr(token_id) for token_id in token_ids),
            clock=lambda: self.now,
        )

    @property
    def plans(self) -> list[StepPlan]:
        return self.channel.plans

    async def add(self, rid: str, num_prompt: int = 4, **facts: Any) -> Request:
        rules = StopRules(max_new_tokens=facts.pop("max_new_tokens", 9), vocab_size=100)
        request = Request(rid=rid, prompt_ids=array("q", range(num_prompt)), stop=rules, **facts)
        self.scheduler.add(request)
        await settle()
        return request

    async def answer(
        self,
        step_id: int,
        tokens: dict[str, int | None],
        *,
        computed: dict[str, int] | None = None,
        rejected: tuple[str, ...] = (),
        failed: tuple[RowFailure, ...] = (),
        available_pages: int = 20,
    ) -> None:
        """Answer a step with a token (or, within a prefill, none) for each row."""
        rows = tuple(
            RowResult(rid=rid, num_computed=(computed or {}).get(rid, 4), num_cached=0, token_id=t)
            for rid, t in tokens.items()
        )
        memory = snapshot(available_pages=available_pages)
        await self.hear(StepResult(step_id, rows, rejected, failed, {}, memory, 0.01))

    async def hear(self, message: FromWorker) -> None:
        self.channel.say(message)
        await settle()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def play(
    scene: Callable[[Stage], Awaitable[None]], *, kind: type[Stage] = Stage, **settings: Any
) -> Stage:
    """Run a scene against a serving scheduler."""

    async def run() -> Stage:
        stage = kind(**settings)
        serving = asyncio.create_task(stage.scheduler.run())
        try:
            await scene(stage)
            if serving.done():
                serving.result()
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
        return stage

    return asyncio.run(run())


def test_what_a_probe_found_cached_is_not_planned() -> None:
    async def scene(stage: Stage) -> None:
        for rid, num_prompt in (("a", 8), ("b", 8), ("c", 8), ("d", 12)):
            await stage.add(rid, num_prompt)
        await stage.answer(0, {"a": 50}, computed={"a": 8})
        await stage.answer(1, {"a": 51}, computed={"a": 9})
        # b, then c take whole chunks of 8; those behind are asked for.
        assert [plan.rows for plan in stage.plans[2:]] == [(Row("b", 8),), (Row("c", 8),)]
        assert [plan.probe for plan in stage.plans[2:]] == [("c", "d"), ("d",)]
        rows = (RowResult("b", num_computed=8, num_cached=0, token_id=60),)
        await stage.hear(StepResult(2, rows, (), (), {"d": 8}, snapshot(), 0.01))
        assert stage.plans[4].rows == (Row("d", 4),)

    play(scene)


def test_one_plan_ahead_and_never_two() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        assert stage.channel.added == ["a"]
        # The prompt, and the token after it without waiting for the first answer.
        assert [plan.rows for plan in stage.plans] == [(Row("a", 4),), (Row("a", 1),)]
        await stage.answer(0, {"a": 50})
        assert stage.plans[2].rows == (Row("a", 1),)
        assert stage.client.outputs["a"] == [50]

    play(scene)


def test_each_token_is_handed_out_as_it_comes() -> None:
    async def scene(stage: Stage) -> None:
        request = await stage.add("a", 4)
        stage.now = 200.0
        await stage.answer(0, {"a": 50})
        stage.now = 300.0
        await stage.answer(1, {"a": 51}, computed={"a": 5})
        assert stage.client.outputs["a"] == [50, 51]
        assert (request.timing.scheduled_at, request.timing.first_token_at) == (100.0, 200.0)

    play(scene)


def test_a_request_in_flight_to_its_limit_is_not_planned_again() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4, max_new_tokens=2)
        assert len(stage.plans) == 2
        await stage.answer(0, {"a": 50})
        assert len(stage.plans) == 2
        await stage.answer(1, {"a": 51}, computed={"a": 5})
        assert stage.client.outputs["a"] == [50, 51]
        assert stage.client.ends["a"].kind == "length"
        assert (stage.plans[2].rows, stage.plans[2].drop) == ((), ("a",))

    play(scene)


def test_the_result_behind_the_end_is_dropped() -> None:
    async def scene(stage: Stage) -> None:
        request = await stage.add("a", 4)
        request.stop = StopRules(max_new_tokens=9, vocab_size=100, token_ids=frozenset({50}))
        await stage.answer(0, {"a": 50})  # a stop token; step 1 already runs one too far
        assert stage.plans[2].drop == ("a",)
        await stage.answer(1, {"a": 51}, computed={"a": 5})
        assert stage.client.outputs["a"] == [50]

    play(scene)


def test_a_late_result_for_an_aborted_request_is_ignored() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        stage.scheduler.abort(lambda request: request.rid == "a", aborted("Aborted"))
        await settle()
        assert stage.client.ends["a"].kind == "abort"
        await stage.answer(0, {"a": 50})
        assert stage.plans[2].drop == ("a",)
        assert stage.client.outputs["a"] == []

    play(scene)


def test_an_aborted_request_in_the_queue_is_refused_and_forgotten() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 16)
        await stage.add("b", 4)  # two plans of "a" are in flight
        stage.scheduler.abort(lambda request: request.rid == "b", aborted("Aborted"))
        await stage.answer(0, {"a": None}, computed={"a": 8})
        assert stage.client.refused["b"].message == "Aborted"
        assert stage.plans[2].drop == ("b",)
        assert [row.rid for row in stage.plans[2].rows] == ["a"]

    play(scene)


def test_a_rejected_request_waits_until_memory_is_back() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4, max_new_tokens=3)
        await stage.add("b", 4)
        await stage.answer(0, {"a": 50})
        assert stage.plans[2].rows == (Row("b", 4),)
        await stage.answer(1, {"a": 51}, computed={"a": 5})
        await stage.answer(2, {}, rejected=("b",), available_pages=1)
        b = stage.scheduler.roster.queue[0]
        assert (b.rid, b.num_retractions, b.num_computed) == ("b", 1, 0)
        # The plan behind the rejection had it too, and fares no better.
        await stage.answer(3, {}, rejected=("b",), available_pages=1)
        assert all(row.rid != "b" for plan in stage.plans[4:] for row in plan.rows)
        await stage.answer(4, {"a": 52}, computed={"a": 6}, available_pages=1)
        # "a" is through: its memory comes back, and "b" gets it.
        assert stage.plans[-2].drop == ("a",)
        assert stage.plans[-2].rows == (Row("b", 4),)

    play(scene)


def test_rejected_but_served_by_the_plan_behind() -> None:
    """It goes back to the queue all the same. If it went on, its prompt would go before the senior's
    decode, fail again, be served by the plan behind again, and so on for ever."""

    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        await stage.add("b", 4)
        await stage.answer(0, {"a": 50})
        await stage.answer(1, {"a": 51}, computed={"a": 5})
        await stage.answer(2, {}, rejected=("b",))
        assert stage.scheduler.roster.queue[0].state is State.QUEUED
        # Step 3 granted "b" one token, meant as a decode; now it is a piece of the prompt.
        await stage.answer(3, {"a": 52, "b": None}, computed={"a": 6, "b": 1})
        assert stage.plans[4].rows == (Row("a", 1),), "made when b was rejected"
        assert (stage.plans[5].rows, stage.plans[5].preempt) == ((Row("a", 1),), ("b",))
        b = stage.scheduler.roster.queue[0]
        assert (b.rid, b.state, b.num_computed) == ("b", State.QUEUED, 0)

    play(scene)


def test_a_token_from_the_plan_behind_a_rejection_is_not_lost() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        b = await stage.add("b", 4)
        await stage.answer(0, {"a": 50})
        await stage.answer(1, {"a": 51}, computed={"a": 5})
        await stage.answer(2, {}, rejected=("b",))
        # All but the last token of b's prompt was cached, so the plan behind samples.
        await stage.answer(3, {"a": 52, "b": 70}, computed={"a": 6})
        assert stage.client.outputs["b"] == [70]
        assert stage.plans[5].preempt == ("b",)
        assert (b.state, b.num_tokens, b.num_computed) == (State.QUEUED, 5, 0)

    play(scene)


def test_only_who_had_computed_something_was_preempted() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        await stage.add("b", 4)
        await stage.answer(0, {"a": 50})
        await stage.answer(1, {"a": 51}, computed={"a": 5})
        # "b" waits as it did before; "a" loses five tokens.
        await stage.answer(2, {}, rejected=("b",))
        await stage.answer(3, {"b": 60}, rejected=("a",))
        counts = [(report.num_rejected, report.num_preempted) for report in stage.client.reports]
        assert counts == [(0, 0), (0, 0), (1, 0), (1, 1)]

    play(scene)


def test_a_request_that_fits_nowhere_is_told_so() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        await stage.answer(0, {}, rejected=("a",), available_pages=0)
        assert stage.client.refused["a"].status == 503
        assert "--memory-budget" in stage.client.refused["a"].message

    play(scene)


def test_a_failed_row_ends_one_request_only() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        await stage.add("b", 4)
        await stage.answer(0, {"a": 50})
        await stage.answer(1, {"a": 51}, failed=(), computed={"a": 5})
        await stage.answer(2, {}, failed=(RowFailure("b", 400, "no such token"),))
        assert stage.client.ends["b"].message == "no such token"
        assert "a" not in stage.client.ends

    play(scene)


def test_a_grammar_is_waited_for_and_may_be_wrong() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("good", 4, has_grammar=True)
        await stage.add("bad", 4, has_grammar=True)
        assert stage.channel.added == ["good", "bad"]
        assert stage.plans == []
        await stage.hear(RequestReady("good"))
        assert stage.plans[0].rows == (Row("good", 4),)
        await stage.hear(RequestReady("bad", error="unclosed group"))
        assert (stage.client.refused["bad"].status, stage.client.refused["bad"].message) == (
            400,
            "unclosed group",
        )

    play(scene)


def test_an_rid_can_be_used_again_once_the_worker_forgot_its_bearer() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4, max_new_tokens=1)
        await stage.answer(0, {"a": 50})
        assert stage.plans[1].drop == ("a",)
        again = await stage.add("a", 6)
        assert stage.channel.added == ["a"]  # not yet
        await stage.answer(1, {})
        assert stage.channel.added == ["a", "a"]
        assert again.state is State.RUNNING

    play(scene)


def test_an_rid_in_use_is_refused() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        await stage.add("a", 4)
        assert stage.client.refused["a"].status == 400
        assert len(stage.scheduler.roster.running) == 1

    play(scene)


def test_pause_in_place_and_go_on() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        stage.scheduler.pause(retract=False)
        await stage.answer(0, {"a": 50})
        await stage.answer(1, {"a": 51}, computed={"a": 5})
        assert len(stage.plans) == 2
        stage.scheduler.resume()
        await settle()
        assert stage.plans[2].rows == (Row("a", 1),)

    play(scene)


def test_pause_with_retraction_keeps_tokens_and_prefills_them_again() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        stage.scheduler.pause(retract=True)
        await settle()
        # Both plans in flight still bring a token each; what they say of KV is void.
        await stage.answer(0, {"a": 50})
        assert stage.plans[2].preempt == ("a",)
        await stage.answer(1, {"a": 51}, computed={"a": 5})
        await stage.answer(2, {})
        assert stage.client.outputs["a"] == [50, 51]
        stage.scheduler.resume()
        await settle()
        assert stage.plans[3].rows == (Row("a", 6),)

    play(scene)


def test_aborting_a_retracted_request_does_not_preempt_a_stranger() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        stage.scheduler.pause(retract=True)
        stage.scheduler.abort(lambda request: True, aborted("Aborted"))
        await stage.answer(0, {"a": 50})
        assert (stage.plans[2].drop, stage.plans[2].preempt) == (("a",), ())

    play(scene)


def test_flush_waits_for_the_worker_to_settle() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4, max_new_tokens=1)
        refused = await stage.scheduler.flush_cache()
        assert not refused.success
        await stage.answer(0, {"a": 50})
        flushing = asyncio.create_task(stage.scheduler.flush_cache())
        await settle()
        assert stage.channel.calls == []  # the worker still has to forget "a"
        await stage.answer(1, {})
        assert [call.call_id for call in stage.channel.calls] == [0]
        await stage.hear(CallDone(0, success=True))
        assert (await flushing).success

    play(scene)


def test_a_full_queue_refuses_or_gives_up_its_last() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 16, priority=1)
        await stage.add("b", 4, priority=1)
        await stage.add("c", 4, priority=1)
        assert stage.client.refused["c"].message == "The request queue is full."
        await stage.add("d", 4, priority=2)
        assert "higher priority" in stage.client.refused["b"].message
        assert [request.rid for request in stage.scheduler.roster.queue] == ["d"]

    play(scene, max_queued=1, use_priority=True)


def test_timeouts() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("running", 16)
        await stage.add("waiting", 4)
        stage.now += 6
        stage.scheduler.check_clocks()
        await settle()
        assert stage.client.refused["waiting"].status == 503
        stage.now += 6
        stage.scheduler.check_clocks()
        await settle()
        assert stage.client.ends["running"].status == 503

    play(scene, waiting_timeout_seconds=5, running_timeout_seconds=10)


def test_reports_tell_prefill_from_decode() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 10)
        await stage.answer(0, {"a": None}, computed={"a": 8})
        await stage.answer(1, {"a": 50}, computed={"a": 10})
        await stage.answer(2, {"a": 51}, computed={"a": 11})
        told = [
            (report.num_admitted, report.prefill_tokens, report.decode_tokens)
            for report in stage.client.reports
        ]
        assert told == [(1, 8, 0), (0, 2, 0), (0, 0, 1)]

    play(scene)
