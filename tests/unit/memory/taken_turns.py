"""Threads that take turns: one runs at a time, and who goes on is drawn where they synchronise.

`TakenTurns` stands in for the modules `threading` and `queue` in code under test. Everything a thread does is stamped with a
vector clock, which locks, conditions, events, starts and joins hand on: that is what "happens before" means for the host.
"""

import threading
from collections import deque
from collections.abc import Callable
from random import Random
from types import TracebackType
from typing import Any

Times = dict[str, int]  # actor -> how many of its acts have happened before

# A run takes 1500. Threads that wait for each other with timeouts never stand still.
MAX_TURNS = 100_000


def join(into: Times, other: Times) -> None:
    for actor, time in other.items():
        into[actor] = max(into.get(actor, 0), time)


class HostThread:
    def __init__(self, name: str, times: Times):
        self.name = name
        self.times = {**times, name: 1}
        self.may_go = threading.Semaphore(0)
        self.is_ready: Callable[[], bool] = lambda: True
        self.is_over = False


class TakenTurns:
    """The thread that makes it is the first."""

    def __init__(self, random: Random):
        self._random = random
        self.current = self._first = HostThread("main", {})
        self._threads = [self.current]
        self.failures: list[BaseException] = []  # what ended a thread other than the first
        self._is_stuck = False
        self._turns_left = MAX_TURNS

    # --------------------------------------------------------- what `threading` and `queue` offer

    def Thread(self, target: Callable[[], None], name: str, daemon: bool) -> "TurnsThread":
        return TurnsThread(self, target, name)

    def Lock(self) -> "TurnsLock":
        return TurnsLock(self)

    def Condition(self) -> "TurnsCondition":
        return TurnsCondition(self)

    def Event(self) -> "TurnsEvent":
        return TurnsEvent(self)

    def SimpleQueue(self) -> "TurnsQueue":
        return TurnsQueue(self)

    # -------------------------------------------------------------------------------- turns, times

    def turn(self, is_ready: Callable[[], bool] = lambda: True) -> None:
        """Another may go on here; the current one does when it is ready and its turn has come."""
        me = self.current
        self._turns_left -= 1
        assert self._turns_left > 0, f"{me.name} goes on and on"
        me.is_ready = is_ready
        if self._pass_on() is not me:  # by now others may have passed it on again
            me.may_go.acquire()
        assert not self._is_stuck, "deadlock: no thread is ready"

    def _pass_on(self) -> HostThread:
        """Who goes on, from this moment."""
        ready = [its for its in self._threads if not its.is_over and its.is_ready()]
        self._is_stuck = not ready
        chosen = self._random.choice(ready) if ready else self._first
        if chosen is not self.current:
            self.current = chosen
            chosen.may_go.release()
        return chosen

    def begin(self, thread: HostThread, target: Callable[[], None]) -> None:
        def run() -> None:
            thread.may_go.acquire()
            try:
                target()
            except BaseException as error:
                self.failures.append(error)
            thread.is_over = True
            self._pass_on()

        self._threads.append(thread)
        threading.Thread(target=run, name=thread.name, daemon=True).start()

    def give(self, times: Times) -> None:
        """What the current thread has done happens before whatever takes these times."""
        join(times, self.current.times)
        self.current.times[self.current.name] += 1

    def take(self, times: Times) -> None:
        join(self.current.times, times)


class TurnsThread:
    def __init__(self, turns: TakenTurns, target: Callable[[], None], name: str):
        self._turns = turns
        self._target = target
        self._name = name

    def start(self) -> None:
        times: Times = {}
        self._turns.give(times)
        self._thread = HostThread(self._name, times)
        self._turns.begin(self._thread, self._target)

    def join(self) -> None:
        self._turns.turn(lambda: self._thread.is_over)
        self._turns.take(self._thread.times)


class TurnsLock:
    def __init__(self, turns: TakenTurns):
        self._turns = turns
        self._times: Times = {}
        self._is_held = False

    def __enter__(self) -> None:
        self._turns.turn(lambda: not self._is_held)
        self._is_held = True
        self._turns.take(self._times)

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turns.give(self._times)
        self._is_held = False


class TurnsCondition(TurnsLock):
    def notify_all(self) -> None:
        """Who waits looks by himself."""

    def wait_for(self, predicate: Callable[[], object]) -> None:
        self.__exit__(None, None, None)
        self._turns.turn(lambda: not self._is_held and bool(predicate()))
        self._is_held = True
        self._turns.take(self._times)


class TurnsEvent:
    def __init__(self, turns: TakenTurns):
        self._turns = turns
        self._times: Times = {}
        self._is_set = False

    def is_set(self) -> bool:
        is_set = self._is_set
        self._turns.turn()  # by when it is acted on, it may have changed
        return is_set

    def set(self) -> None:
        self._turns.give(self._times)
        self._is_set = True
        self._turns.turn()

    def clear(self) -> None:
        self._is_set = False
        self._turns.turn()

    def wait(self, timeout: float | None = None) -> bool:
        """With a timeout it may be over at once, or after a while."""
        self._turns.turn(lambda: self._is_set or timeout is not None)
        if self._is_set:
            self._turns.take(self._times)
        return self._is_set


class TurnsQueue:
    def __init__(self, turns: TakenTurns):
        self._turns = turns
        self._items: deque[tuple[Any, Times]] = deque()

    def put(self, item: Any) -> None:
        times: Times = {}
        self._turns.give(times)
        self._items.append((item, times))

    def get_nowait(self) -> Any:
        item, times = self._items.popleft()
        self._turns.take(times)
        return item
