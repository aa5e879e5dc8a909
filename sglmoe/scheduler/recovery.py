"""A new worker for a lost one: how often that is tried, what is told of it, and when it is given up.

Knows no requests: what becomes of those is the scheduler's to say.
"""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from sglmoe.errors.workers import given_up
from sglmoe.protocol import WorkerReady
from sglmoe.scheduler.report import Restarts
from sglmoe.scheduler.seams import WorkerChannel, WorkerLost

logger = logging.getLogger(__name__)

# Arbitrary: so many workers in a row that end without having served anything, and without a request to blame, are enough.
MAX_IN_VAIN = 3
# Arbitrary: the pause before the next one, for each that has ended so; memory of the last may take a while to come back.
PAUSE_SECONDS = 1.0


class Recovery:
    """Replaces the worker behind `worker`, the line to it."""

    def __init__(
        self,
        *,
        worker: WorkerChannel,
        clock: Callable[[], float],
        silence_seconds: float | None,
    ) -> None:
        self.is_under_way = False
        self.restarts = Restarts()
        self._worker = worker
        self._clock = clock
        self._silence_seconds = silence_seconds
        self._lost_at = 0.0
        self._num_in_vain = 0

    @property
    def lost_seconds(self) -> float:
        """For how long there has been no worker; 0 while one serves."""
        return self._clock() - self._lost_at if self.is_under_way else 0.0

    def begin(self, cause: str, *, num_suspects: int, num_waiting: int) -> None:
        """The worker is lost, at work for `num_suspects` requests; `num_waiting` need another one."""
        self.is_under_way = True
        self._lost_at = self._clock()
        self.restarts = msgspec.structs.replace(self.restarts, cause=cause)
        if not num_suspects:
            self._num_in_vain += 1
        logger.error("%s\nAnother one is started; %d requests wait for it.", cause, num_waiting)

    async def new_worker(self) -> WorkerReady:
        """The next worker that can serve. Raises WorkerLost when it is no use trying any more."""
        while True:
            if self._num_in_vain >= MAX_IN_VAIN:
                why = given_up(num_workers=self._num_in_vain, cause=self.restarts.cause)
                raise WorkerLost(str(why))
            await asyncio.sleep(PAUSE_SECONDS * self._num_in_vain)
            try:
                return await self._worker.replace(silence_seconds=self._silence_seconds)
            except WorkerLost as lost:
                self._num_in_vain += 1
                self.restarts = msgspec.structs.replace(self.restarts, cause=str(lost))
                logger.error("The new worker did not start: %s", lost)

    def end(self) -> Restarts:
        """The new worker knows what to do."""
        self.is_under_way = False
        seconds = self._clock() - self._lost_at
        self.restarts = msgspec.structs.replace(
            self.restarts, count=self.restarts.count + 1, ready_seconds=seconds, token_seconds=0.0
        )
        logger.warning("A new worker serves, %.1f s after the last one was lost", seconds)
        return self.restarts

    def request_failed(self) -> None:
        """A request was found to be what workers die of."""
        self.restarts = msgspec.structs.replace(
            self.restarts, failed_requests=self.restarts.failed_requests + 1
        )

    def step_done(self, *, got_tokens: bool) -> None:
        """The worker answered a step that had rows, some of them with tokens or none."""
        self._num_in_vain = 0
        if got_tokens and self.restarts.count and not self.restarts.token_seconds:
            seconds = self._clock() - self._lost_at
            self.restarts = msgspec.structs.replace(self.restarts, token_seconds=seconds)
            logger.warning("First token, %.1f s after the last worker was lost", seconds)
