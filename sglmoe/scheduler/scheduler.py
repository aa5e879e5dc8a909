"""The owner of requests: takes them in, keeps the worker one plan ahead, hands results out.

Every method that changes state is synchronous; only `run` and its tasks do I/O. Knows nothing of SGLang: the front end
gives it `Request`s and is given them back through `Outputs`.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import assert_never

from sglmoe.errors import requests, sglang_words
from sglmoe.protocol import (
    AddRequests,
    CallDone,
    FlushCache,
    FromWorker,
    Limits,
    MemorySnapshot,
    RequestReady,
    RowResult,
    StepResult,
    WorkerCall,
    WorkerFailed,
    WorkerProgress,
    WorkerReady,
)
from sglmoe.scheduler.endings import fatal, never_fits, no_longer_fits
from sglmoe.scheduler.finish import Decode, FinishReason, aborted, failed
from sglmoe.scheduler.planner import Planner
from sglmoe.scheduler.recovery import Recovery
from sglmoe.scheduler.report import ONE_DECODED, RowTally, summarize, tally_row
from sglmoe.scheduler.request import Request, State
from sglmoe.scheduler.roster import Roster
from sglmoe.scheduler.seams import Outputs, WorkerChannel, WorkerLost
from sglmoe.scheduler.settings import SchedulerSettings
from sglmoe.scheduler.suspects import Suspects
from sglmoe.scheduler.timeouts import Watchdog, late_requests
from sglmoe.scheduler.worker_calls import WorkerCalls

logger = logging.getLogger(__name__)


class Scheduler:
    """Read `run`, `_pump` and `_on_step_result` first; plans are made in `planner`."""

    def __init__(
        self,
        *,
        worker: WorkerChannel,
        outputs: Outputs,
        limits: Limits,
        snapshot: MemorySnapshot,
        settings: SchedulerSettings,
        decode: Decode,
        clock: Callable[[], float],
    ) -> None:
        self.limits = limits
        self.paused = False
        self.roster = Roster(
            use_priority=settings.use_priority, low_values_first=settings.low_values_first
        )
        self.planner = Planner(
            roster=self.roster,
            limits=limits,
            snapshot=snapshot,
            policy=settings.policy,
            ratio=settings.first_ratio(),
        )
        self.recovery = Recovery(
            worker=worker, clock=clock, silence_seconds=settings.watchdog_seconds
        )
        self._suspects = Suspects()
        self._settings = settings
        self._worker = worker
        self._outputs = outputs
        self._decode = decode
        self._clock = clock
        self._calls = WorkerCalls(worker.send)
        self._unannounced: list[Request] = []  # the worker does not know them yet
        self._watchdog = Watchdog(settings.watchdog_seconds, clock)
        self._changed: dict[int, Request] = {}  # by arrival; to be published
        self._refused: list[Request] = []
        self._wake = asyncio.Event()
        self._progress = asyncio.Condition()

    # -------------------------------------------------------------------------------------------- what is asked of it

    def add(self, request: Request) -> None:
        """Take a request in. A full queue or an rid in use refuses it."""
        self.roster.number(request)
        request.timing.queued_at = self._clock()
        if request.rid in self.roster.live:
            self.reject(request, failed(requests.rid_in_use(rid=request.rid)))
        elif self.roster.is_leaving(request.rid):
            self.roster.hold_back(request)
        elif self._has_room_for(request):
            self.roster.enter(request)
            self._unannounced.append(request)
        self._wake.set()

    def reject(self, request: Request, reason: FinishReason) -> None:
        """End a request that is not live."""
        request.state = State.FINISHED
        request.finish = reason
        self._refused.append(request)
        self._wake.set()

    def abort(self, matches: Callable[[Request], bool], reason: FinishReason) -> None:
        """End every request that matches: what waits is refused, what runs gets its last output."""
        for request in [live for live in self.roster.live.values() if matches(live)]:
            self._end(request, reason)
        for request in self.roster.take_held_back(matches):
            self.reject(request, reason)
        self._wake.set()

    def pause(self, *, retract: bool) -> None:
        """Plan nothing more until `resume`; with `retract`, running requests give their memory back and queue again."""
        self.paused = True
        if retract:
            for request in list(self.roster.running):
                self.planner.preempt(request)
        self._wake.set()

    def resume(self) -> None:
        self.paused = False
        self._wake.set()

    async def flush_cache(self, *, timeout_seconds: float = 0.0) -> CallDone:
        """Forget cached prefixes. Refused while requests run or, unless paused, wait; `timeout_seconds` waits for that."""
        if not self._is_idle():
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._until(self._is_idle)
            except TimeoutError:
                queued, running = len(self.roster.queue), len(self.roster.running)
                why = requests.requests_pending(num_queued=queued, num_running=running)
                return CallDone(-1, success=False, message=str(why))
        await self._until(lambda: self.planner.settled)
        return await self.ask_worker(FlushCache(-1))

    async def ask_worker(self, request: WorkerCall) -> CallDone:
        """Pass it on and wait for the answer; its call_id is replaced."""
        if self.recovery.is_under_way:
            return CallDone(-1, success=False, message=str(requests.worker_being_replaced()))
        return await self._calls.call(request)

    @property
    def awaits_worker(self) -> bool:
        """Whether the worker owes a sign of life: an answer, or its first word."""
        return self.recovery.is_under_way or self._owed is not None

    def fail_all(self, message: str) -> None:
        """End everything with an error of ours, and every call too."""
        self.abort(lambda request: True, aborted(message, 500))
        self._calls.fail_all(message)

    # ----------------------------------------------------------------------------------------------------- what it does

    async def run(self) -> None:
        """Serve until no worker can be had (WorkerLost) or something breaks; then end all requests and raise."""
        tasks = [
            asyncio.create_task(serve()) for serve in (self._pump, self._follow_worker, self._tick)
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Exception as error:
            self.fail_all(str(error) if isinstance(error, WorkerLost) else f"scheduler: {error!r}")
            await self.flush_outputs()
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def flush_outputs(self) -> None:
        """Hand out whatever is new."""
        if self._refused:
            refused, self._refused = self._refused, []
            await self._outputs.refuse(refused)
        if self._changed:
            changed, self._changed = self._changed, {}
            await self._outputs.publish(list(changed.values()))

    async def _pump(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not self.recovery.is_under_way:
                if (tried := self._suspects.choose()) and tried.state is State.RUNNING:
                    self.planner.preempt(tried)  # its memory is the next one's
                self._announce()
                self._send_plans()
            await self.flush_outputs()
            async with self._progress:
                self._progress.notify_all()

    async def _follow_worker(self) -> None:
        while True:
            try:
                self._on_message(await self._worker.receive())
            except WorkerLost as lost:
                self._lose_worker(str(lost))
                self._wake.set()
                self._meet_worker(await self.recovery.new_worker())
            self._wake.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.check_clocks()

    def _send_plans(self) -> None:
        while True:
            if self._owed is None:
                self._watchdog.feed()
            alone = self._suspects.on_trial
            plan = self.planner.next_plan(now=self._clock(), paused=self.paused, alone=alone)
            if plan is None:
                return
            self._worker.send(plan)

    def _announce(self) -> None:
        alone, waiting = self._suspects.on_trial, self._unannounced
        fresh = [request for request in waiting if alone in (None, request)]
        if fresh:
            self._unannounced = [request for request in waiting if alone not in (None, request)]
            self._worker.send(AddRequests(tuple(request.announcement() for request in fresh)))

    # ------------------------------------------------------------------------------------------------- a worker's end

    def _lose_worker(self, cause: str) -> None:
        """Take everything back to where another worker can begin: each request, with its tokens, waits at its place."""
        compiling = [
            request
            for request in self.roster.live.values()
            if request.state is State.PREPARING and request not in self._unannounced
        ]
        present = self.planner.at_work(self._worker.last_begun) + compiling
        self.recovery.begin(cause, num_suspects=len(present), num_waiting=len(self.roster.live))
        self._calls.fail_all(str(requests.worker_lost(cause=cause)))
        self.planner.lose_worker()
        self._unannounced = list(self.roster.live.values())
        if guilty := self._suspects.accuse(present):
            self.recovery.request_failed()
            self._end(guilty, fatal(guilty, cause))
        for request in self.roster.take_held_back(lambda _: True):
            self.add(request)

    def _meet_worker(self, ready: WorkerReady) -> None:
        self.limits = ready.limits
        self.planner.meet_worker(ready.limits, ready.snapshot)
        for request in list(self.roster.live.values()):
            if reason := no_longer_fits(request, ready.limits):
                self._end(request, reason)
        self._outputs.worker_replaced(ready, self.recovery.end())
        self._watchdog.feed()

    # ---------------------------------------------------------------------------------------------------------- results

    def _on_message(self, message: FromWorker) -> None:
        self._watchdog.feed()
        match message:
            case StepResult():
                self._on_step_result(message)
            case RequestReady():
                self._on_ready(message)
            case CallDone():
                self._calls.answer(message)
            case WorkerFailed():
                raise WorkerLost(message.error)
            case WorkerReady() | WorkerProgress():
                raise WorkerLost(f"the worker sent {type(message).__name__} while serving")
            case _:
                assert_never(message)

    def _on_step_result(self, result: StepResult) -> None:
        try:
            answered = self.planner.answer(result)
        except ValueError as error:
            raise WorkerLost(str(error)) from error
        requests, step_id, changed = answered.requests, result.step_id, self._changed
        tallies: list[RowTally] = []
        for row in result.rows:
            request = requests[row.rid]
            if request.takes_decoded(row, step_id):
                changed[request.arrival] = request
                tallies.append(ONE_DECODED)
            elif not request.finished:
                tallies.append(self._on_row(request, row, step_id))
        for failure in result.failed:
            if failing := self.roster.live.get(failure.rid):
                self._end(failing, aborted(failure.message, failure.status))
        named = [requests[rid] for rid in result.rejected]
        rejected = [request for request in named if not request.finished]
        self._outputs.step_done(summarize(result, tallies, rejected))
        if requests:
            self.recovery.step_done(got_tokens=any(r.token_id is not None for r in result.rows))
        self._on_rejected(rejected, step_id)
        for request in self.roster.take_held_back(lambda _: True):
            self.add(request)

    def _on_row(self, request: Request, row: RowResult, step_id: int) -> RowTally:
        tally = tally_row(request, row)
        request.reached(row.num_computed)
        was_rejected = step_id >= request.evicted_step and request.state is State.QUEUED
        if step_id >= request.evicted_step:
            if not request.output_ids and not request.num_computed:
                request.num_cached = row.num_cached
            request.num_computed = row.num_computed
            if was_rejected:  # but the plan behind had room for it
                self.roster.start(request)
        request.record_prompt_logprobs(row.prompt_logprobs)
        request.record_routing(row.routed_experts, end=row.num_computed)
        if row.token_id is not None:
            self._on_token(request, row, row.token_id)
        if was_rejected and not request.finished:
            self.planner.preempt(request)  # back to where it waits: see "Who finishes" in design.md
        return tally

    def _on_token(self, request: Request, row: RowResult, token_id: int) -> None:
        self._changed[request.arrival] = request
        if ended := request.take_token(row, token_id, now=self._clock(), decode=self._decode):
            self._end(request, ended)

    def _on_ready(self, ready: RequestReady) -> None:
        request = self.roster.live.get(ready.rid)
        if request is None or request.state is not State.PREPARING:
            return
        request.reached(0)
        if ready.error:
            self._end(request, aborted(ready.error, 400))
        else:
            self.roster.enqueue(request)

    def _on_rejected(self, rejected: Sequence[Request], step_id: int) -> None:
        self.planner.reject(rejected, step_id=step_id)
        if rejected:
            logger.warning("KV memory is full, %d requests wait again", len(rejected))
        if rejected and not self.roster.running and not self.roster.any_leaving:
            self._end(rejected[0], never_fits(rejected[0], self.planner.snapshot))

    # ------------------------------------------------------------------------------------------------------------- ends

    def _end(self, request: Request, reason: FinishReason) -> None:
        """Finish a live request and see to it that both sides hear of it."""
        was_running = request.state is State.RUNNING
        announced = request not in self._unannounced
        self.roster.finish(request, reason, known_to_worker=announced)
        request.timing.finished_at = self._clock()
        if announced:
            self.planner.drop(request)
        else:
            self._unannounced.remove(request)
        if was_running:
            self._changed[request.arrival] = request
        else:
            self._changed.pop(request.arrival, None)
            self._refused.append(request)
        if not self.roster.live:
            self.planner.ratio.reset()

    def _has_room_for(self, request: Request) -> bool:
        """Whether the queue takes one more; a less important request may have to go for it."""
        queue, limit = self.roster.queue, self._settings.max_queued
        if limit is None or len(queue) < limit:
            return True
        if queue and self.roster.rank(request) < self.roster.rank(queue[-1]):
            self._end(queue[-1], aborted(sglang_words.MORE_IMPORTANT, 503))
            return True
        self.reject(request, aborted(sglang_words.QUEUE_FULL, 503))
        return False

    def check_clocks(self) -> None:
        """End what waited or ran for too long, and the worker if it owes an answer for too long."""
        for request, reason in list(late_requests(self.roster, self._settings, self._clock())):
            self._end(request, aborted(reason, 503))
            self._wake.set()
        if cause := self._watchdog.overdue(self._owed):
            self._worker.kill(cause)

    @property
    def _owed(self) -> str | None:
        """What a worker that serves has to answer, if anything: its plans, and while nobody else may run, a grammar."""
        tried = self._suspects.on_trial
        if self.recovery.is_under_way:
            return None
        if self.planner.oldest is not None:
            return f"step {self.planner.oldest.step_id}"
        return "a grammar" if tried and tried.state is State.PREPARING else None

    def _is_idle(self) -> bool:
        return not self.roster.running and (self.paused or not self.roster.live)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with self._progress:
            await self._progress.wait_for(condition)
