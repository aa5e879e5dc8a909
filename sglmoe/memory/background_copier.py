"""The thread that brings experts in while layers compute."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

from sglmoe.memory.experts import Load
from sglmoe.memory.link_gate import LinkGate
from sglmoe.memory.prefetch import Arrival
from sglmoe.memory.store import ExpertReadError

logger = logging.getLogger(__name__)

# What was queued on the device before it; None where nothing is queued.
Mark: TypeAlias = Any
# Returns when the expert is in its frame, whose last tenant may be read by what was queued before the
# mark. Calls its argument before each chunk: what that raises ends the copy.
Copy: TypeAlias = Callable[[Load, Mark, Callable[[], None]], None]
# Arbitrary: how soon a cancelled copy notices, while a demand load holds it up.
CANCEL_SECONDS = 0.01


class _Cancelled(Exception):
    """The copy is not wanted any more."""


class _Job:
    """A load, and what became of it."""

    def __init__(self, load: Load, mark: Mark):
        self.load = load
        self.mark = mark
        self.is_demanded = False
        self.is_cancelled = False
        self.is_there: bool | None = None  # None: it has not ended


class BackgroundCopier:
    """A `BackgroundLoader` over one thread. `copy` runs there; it waits for `demand` before each
    chunk, and closes `prefetch` meanwhile. `mark` is called as a load is begun, in the main thread;
    `came` with each that is in its frame, by whoever has brought it, before it is told as finished."""

    def __init__(
        self,
        copy: Copy,
        *,
        demand: LinkGate,
        prefetch: LinkGate,
        mark: Callable[[], Mark] = lambda: None,
        came: Callable[[Load], None] | None = None,
    ):
        self._copy = copy
        self._mark = mark
        self._came = came
        self._demand = demand
        self._prefetch = prefetch
        self._changed = threading.Condition()  # over all that follows
        self._queue: deque[_Job] = deque()
        self._urgent: deque[_Job] = deque()  # before those
        self._running: _Job | None = None
        self._ended: list[_Job] = []  # not yet told of
        self._promoted: dict[Load, _Job] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="expert-prefetch", daemon=True)
        self._thread.start()

    def begin(self, load: Load) -> None:
        """See `BackgroundLoader`; so are the next three."""
        job = _Job(load, self._mark())
        with self._changed:
            self._queue.append(job)
            self._changed.notify_all()

    def finished(self) -> list[Arrival]:
        with self._changed:
            ended, self._ended = self._ended, []
        return [Arrival(job.load, bool(job.is_there)) for job in ended]

    def promote(self, load: Load) -> None:
        with self._changed:
            job = self._promoted[load] = self._take(load)
            job.is_demanded = True
            if job in self._queue:
                self._queue.remove(job)
                self._urgent.append(job)

    def wait(self, load: Load) -> bool:
        with self._changed:
            job = self._promoted.pop(load)
            if has_begun := job not in self._urgent:
                self._changed.wait_for(lambda: job.is_there is not None)
            else:
                self._urgent.remove(job)
        return bool(job.is_there) if has_begun else self._copy_now(job)

    def cancel(self, load: Load) -> None:
        with self._changed:
            job = self._take(load)
            job.is_cancelled = True
            if job in self._queue:
                self._queue.remove(job)
            else:
                self._changed.wait_for(lambda: job.is_there is not None)

    def close(self) -> None:
        """Stop, in the middle of an expert if need be."""
        with self._changed:
            self._closing = True
            jobs = (*self._queue, *filter(None, [self._running]), *self._promoted.values())
            for job in jobs:
                job.is_cancelled = True
            self._changed.notify_all()
        self._thread.join()

    def _take(self, load: Load) -> _Job:
        """Its job, which will not be among those that have ended."""
        running = [self._running] if self._running else []
        job = next(
            (job for job in (*self._queue, *running, *self._ended) if job.load == load), None
        )
        assert job is not None, f"{load} was not begun"
        if job in self._ended:
            self._ended.remove(job)
        elif job is self._running:
            self._running = None
        return job

    def _copy_now(self, job: _Job) -> bool:
        """In this thread, while all others give way."""
        with self._demand.closed():
            return self._try_copy(job)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._urgent or self._queue or self._closing)
                if self._closing:
                    return
                job = (self._urgent or self._queue).popleft()
                self._running = None if job.is_demanded else job
            with self._prefetch.closed():
                is_there = self._try_copy(job)
            with self._changed:
                job.is_there = is_there
                if self._running is job:  # else somebody waits for it
                    self._ended.append(job)
                    self._running = None
                self._changed.notify_all()

    def _try_copy(self, job: _Job) -> bool:
        try:
            self._copy(job.load, job.mark, lambda: self._before_chunk(job))
            if self._came is not None:
                self._came(job.load)
        except _Cancelled:
            return False
        except ExpertReadError as error:
            logger.warning("not prefetched: %s", error)
            return False
        except Exception:
            logger.exception("not prefetched: layer %d expert %d", job.load.layer, job.load.expert)
            return False
        return True

    def _before_chunk(self, job: _Job) -> None:
        while not (job.is_demanded or job.is_cancelled):
            if self._demand.wait(CANCEL_SECONDS):
                return
        if job.is_cancelled:
            raise _Cancelled
