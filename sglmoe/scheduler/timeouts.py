"""Requests that waited or ran for too long."""

from collections.abc import Iterator

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
                yield request, "Request waiting timeout reached."
    if (limit := settings.running_timeout_seconds) is not None:
        for request in roster.running:
            if now - request.timing.scheduled_at > limit:
                yield request, "Request running timeout reached."
