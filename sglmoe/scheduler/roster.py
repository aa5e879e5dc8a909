"""Which requests there are and in which state: the lists behind the scheduler, kept consistent by a few moves.

PREPARING -> QUEUED <-> RUNNING, and from anywhere to FINISHED; with a new worker all begin anew. Knows nothing of plans.
"""

from bisect import insort
from collections.abc import Callable, Sequence
from typing import assert_never

from sglmoe.scheduler.finish import FinishReason
from sglmoe.scheduler.request import Request, State


class Roster:
    """All live requests, the queue and the running ones both most senior first.

    `use_priority` lets priority go before arrival; higher values first unless `low_values_first`.
    """

    def __init__(self, *, use_priority: bool, low_values_first: bool) -> None:
        self.live: dict[str, Request] = {}
        self.queue: list[Request] = []
        self.running: list[Request] = []
        self._sign = (1 if low_values_first else -1) if use_priority else 0
        # Finished, but the worker may still speak of them, so that their rids can't be given away.
        self._leaving: set[str] = set()
        self._held_back: list[Request] = []
        self._num_arrived = 0

    # --------------------------------------------------------------------------------------------------------- arrivals

    def is_leaving(self, rid: str) -> bool:
        return rid in self._leaving

    @property
    def any_leaving(self) -> bool:
        return bool(self._leaving)

    def hold_back(self, request: Request) -> None:
        """Keep a request until the last bearer of its rid has left the worker."""
        self._held_back.append(request)

    def take_held_back(self, matches: Callable[[Request], bool]) -> list[Request]:
        taken = [request for request in self._held_back if matches(request)]
        self._held_back = [request for request in self._held_back if not matches(request)]
        return taken

    def number(self, request: Request) -> None:
        request.arrival = self._num_arrived
        self._num_arrived += 1

    def enter(self, request: Request) -> None:
        """Make a request live: into the queue, or aside while its grammar is compiled."""
        self.live[request.rid] = request
        if request.has_grammar:
            request.state = State.PREPARING
        else:
            self.enqueue(request)

    @property
    def num_preparing(self) -> int:
        return len(self.live) - len(self.queue) - len(self.running)

    # ------------------------------------------------------------------------------------------------------------ moves

    def enqueue(self, request: Request) -> None:
        request.state = State.QUEUED
        insort(self.queue, request, key=self._seniority)

    def start(self, request: Request) -> None:
        """QUEUED to RUNNING."""
        self.queue.remove(request)
        request.state = State.RUNNING
        insort(self.running, request, key=self._seniority)

    def evict(self, request: Request, *, step_id: int) -> None:
        """RUNNING to QUEUED, if it still runs; its KV is gone as of `step_id`."""
        if request.state is State.RUNNING:
            self.running.remove(request)
            self.enqueue(request)
        request.lose_memory(step_id)

    def lose_worker(self, *, step_id: int) -> None:
        """No worker knows any of them: what ran waits again as of `step_id`, and grammars have to be compiled again."""
        for request in list(self.running):
            self.evict(request, step_id=step_id)
        self.queue = [request for request in self.queue if not request.has_grammar]
        for request in self.live.values():
            if request.has_grammar:
                request.state = State.PREPARING
            request.lose_worker()
        self._leaving.clear()

    def finish(self, request: Request, reason: FinishReason, *, known_to_worker: bool) -> None:
        """Any state to FINISHED, and out of every list."""
        match request.state:
            case State.RUNNING:
                self.running.remove(request)
            case State.QUEUED:
                self.queue.remove(request)
            case State.PREPARING:
                pass
            case State.FINISHED:
                raise AssertionError(f"{request.rid} finishes twice")
            case _:
                assert_never(request.state)
        del self.live[request.rid]
        if known_to_worker:
            self._leaving.add(request.rid)
        request.state = State.FINISHED
        request.finish = reason

    def left(self, rids: Sequence[str]) -> None:
        """The worker has forgotten these."""
        self._leaving.difference_update(rids)

    # --------------------------------------------------------------------------------------------------------- seniority

    def rank(self, request: Request) -> int:
        """By priority: lower goes first; the same for all where priorities do not count."""
        return self._sign * request.priority if request.priority is not None else 0

    def _seniority(self, request: Request) -> tuple[int, int]:
        return self.rank(request), request.arrival
