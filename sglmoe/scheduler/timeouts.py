"""Requests that waited or ran for too long, and a worker that has owed an answer for too long."""

from collections.abc import Callable, Iterator

from sglmoe.errors import sglang_words
from sglmoe.errors.workers import stuck
from sglmoe.scheduler.request import Request
from sglmoe.scheduler.roster import Roster
from sglmoe.scheduler.settings import SchedulerSettings


def late_requests(
    roster: Roster, settings: SchedulerSettings, now: float
) -> Iterator[tuple[Request, str]]:
    """Those to end, and why. Who waits again, after a preemption or for a new worker, has not waited since it came."""
    if (limit := settings.waiting_timeout_seconds) is not None:
        for request in roster.queue:
            if not request.timing.scheduled_at and now - request.timing.queued_at > limit:
                yield request, sglang_words.WAITED_TOO_LONG
    if (limit := settings.running_timeout_seconds) is not None:
        for request in roster.running:
            if now - request.timing.scheduled_at > limit:
                yield request, sglang_words.RAN_TOO_LONG


class Watchdog:
    """Barks when it has not been fed for `limit_seconds` while something is owed; never with None."""

    def __init__(self, limit_seconds: float | None, clock: Callable[[], float]) -> None:
        self._limit_seconds = limit_seconds
        self._clock = clock
        self._fed_at = clock()

    def feed(self) -> None:
        """The worker spoke, or was given something to do."""
        self._fed_at = self._clock()

    def overdue(self, owed: str | None) -> str | None:
        """Why the worker is to be killed, if it is; said once. `owed` is what it is waited for, None for nothing."""
        limit = self._limit_seconds
        if owed is None or limit is None or self._clock() - self._fed_at <= limit:
            return None
        self.feed()
        return str(stuck(seconds=limit, owed=owed))
