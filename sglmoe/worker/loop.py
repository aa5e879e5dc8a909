"""What the worker does all day: takes the scheduler's messages in their order, and answers.

A plan whose step can follow the one that runs (`Worker.follow`) begins before that is finished, so that a device which computes
without the host need not wait for it. Everything else waits until nothing runs.
"""

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from sglmoe.protocol import (
    AddRequests,
    CallDone,
    FromWorker,
    RequestReady,
    Shutdown,
    StepPlan,
    ToWorker,
    WorkerCall,
)
from sglmoe.step_mark import StepMark
from sglmoe.transport import Receiver, Sender
from sglmoe.worker.heap import Heap
from sglmoe.worker.request import WorkerRequest
from sglmoe.worker.worker import RunningStep, Worker

# How long the loop sleeps at most while a grammar is being compiled.
GRAMMAR_POLL_SECONDS = 0.005
# Arbitrary: between two looks whether the step that runs is over, or another plan has come.
POLL_SECONDS = 20e-6


class Grammars(Protocol):
    """The seam to the model, beside `Worker`'s: constraints are compiled while steps run."""

    def add(self, request: WorkerRequest) -> str | None:
        """Take a request in. Its grammar's error or "" if that is known; None without one, or if `ready_grammars` will tell."""

    def ready_grammars(self) -> Iterator[tuple[str, str]]: ...

    @property
    def has_pending_grammars(self) -> bool: ...


class Loop:
    """Receives, dispatches, answers. `answer`: to what the scheduler asks for between two steps."""

    def __init__(
        self,
        plans: Receiver[ToWorker],
        sender: Sender[FromWorker],
        step_mark: StepMark,
        worker: Worker,
        grammars: Grammars,
        answer: Callable[[WorkerCall], CallDone],
    ):
        self._plans = plans
        self._sender = sender
        self._step_mark = step_mark
        self._worker = worker
        self._grammars = grammars
        self._answer = answer
        self._heap = Heap()
        self._running: RunningStep | None = None

    def run(self) -> None:
        """Until the scheduler says to leave."""
        while True:
            message = self._receive()
            for rid, error in self._grammars.ready_grammars():
                self._sender.send(RequestReady(rid=rid, error=error))
            if isinstance(message, Shutdown):
                return
            if message is not None:
                self._handle(message)

    def _receive(self) -> ToWorker | None:
        """The next message; None once in a while as long as grammars are being compiled. A step that runs meanwhile is finished
        when it is over."""
        while (step := self._running) is not None:
            if step.is_over:
                self._finish(step)
            elif (message := self._plans.receive(0)) is not None:
                return message
            else:
                time.sleep(POLL_SECONDS)
        is_compiling = self._grammars.has_pending_grammars
        return self._plans.receive(GRAMMAR_POLL_SECONDS if is_compiling else None)

    def _handle(self, message: StepPlan | AddRequests | WorkerCall) -> None:
        match message:
            case StepPlan():
                self._step(message)
            case AddRequests():
                self._add(message)
            case _:
                if self._running is not None:
                    self._finish(self._running)
                self._sender.send(self._answer(message))

    def _step(self, plan: StepPlan) -> None:
        """Begin the plan's step, behind the one that runs if it can follow that; finish whatever nothing can follow."""
        running, worker = self._running, self._worker
        following = None if running is None else worker.follow(plan, running)
        if running is not None:
            self._finish(running, is_followed=following is not None)
        self._step_mark.step_id = plan.step_id
        step = self._running = following or worker.begin(plan)
        if not step.may_be_followed:
            self._finish(step)

    def _finish(self, step: RunningStep, *, is_followed: bool = False) -> None:
        self._running = None
        self._sender.send(self._worker.finish(step, is_followed=is_followed))
        self._heap.step_done()

    def _add(self, message: AddRequests) -> None:
        for spec in message.requests:
            error = self._grammars.add(self._worker.add(spec))
            if error is not None:
                self._sender.send(RequestReady(rid=spec.rid, error=error))
