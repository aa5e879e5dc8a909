"""What the scheduler stands between, as interfaces: the worker behind it and the front end before it."""

from collections.abc import Sequence
from typing import Protocol

from sglmoe.protocol import FromWorker, ToWorker, WorkerReady
from sglmoe.scheduler.report import Restarts, StepReport
from sglmoe.scheduler.request import Request


class WorkerLost(Exception):
    """The worker is gone or stuck; the message says why and what to change."""


class WorkerChannel(Protocol):
    """The line to whichever worker serves now. One that died is received as WorkerFailed, once it has been heard out."""

    @property
    def last_begun(self) -> int:
        """The step that the worker began last, also of one that has died; -1 if it began none."""

    def send(self, message: ToWorker) -> None:
        """Never waits. What is sent to a worker that is gone is lost with it."""

    async def receive(self) -> FromWorker: ...

    def kill(self, cause: str) -> None:
        """End a worker that hangs; it is received as WorkerFailed with this cause."""

    async def replace(self, *, silence_seconds: float | None) -> WorkerReady:
        """Put a new worker in the place of this one, which is killed if it still lives.

        Raises WorkerLost if it can't start, or says nothing for `silence_seconds` more than the first one took to load.
        May be called again then.
        """


class Outputs(Protocol):
    """Where results go."""

    async def publish(self, requests: Sequence[Request]) -> None:
        """Requests that have new tokens or came to their end while running."""

    async def refuse(self, requests: Sequence[Request]) -> None:
        """Requests that came to their end while they waited."""

    def step_done(self, report: StepReport) -> None:
        """The worker answered a step."""

    def worker_replaced(self, ready: WorkerReady, restarts: Restarts) -> None:
        """A new worker serves."""
