"""The predictor thread: hears of every step and layer, and says what to bring in next.

Both directions go through queues that nobody waits for: a forward pass is never held up, it finds
no outlook, or one from a layer ago.
"""

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeAlias, assert_never

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.prediction.advisor import Advisor, LinkTimes, Outlook
from sglmoe.prediction.predictor import LayerRouting, StepTokens

logger = logging.getLogger(__name__)

# Arbitrary: a thread that is behind by more events is told of no other step until it has caught up.
MAX_WAITING = 256
# So long at most does the forward pass wait for the interpreter when this thread has it; Python's own 5 ms are several layers.
SWITCH_SECONDS = 1e-4


class StepBegun(msgspec.Struct, frozen=True, eq=False):
    step: int
    tokens: StepTokens
    times: LinkTimes
    late: int  # prefetches of the step before that were late, and those that were of no use
    unused: int


class LayerRouted(msgspec.Struct, frozen=True, eq=False):
    routing: Callable[[], LayerRouting]  # to be called in the thread: it may wait for the device
    was_absent: npt.NDArray[np.bool_]  # [num_experts]


class RequestEnded(msgspec.Struct, frozen=True):
    owner: int


class Closed(msgspec.Struct, frozen=True):
    """The last event."""


Event: TypeAlias = StepBegun | LayerRouted | RequestEnded | Closed


class PredictorThread:
    """Owns the advisor, once `start` was called. All other methods are for the forward pass's thread."""

    def __init__(self, advisor: Advisor):
        self.advisor = advisor
        self.num_skipped = 0  # steps it was not told of
        self.failed = False
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._outlooks: deque[Outlook] = deque(maxlen=1)
        self._skips = False
        self._num_told = 0  # counted by who tells,
        self._num_heard = 0  # and by the thread
        self._thread = threading.Thread(target=self._run, name="expert-predictor", daemon=True)

    def start(self) -> None:
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self._thread.start()

    def close(self) -> None:
        """Return when it has ended."""
        self._tell(Closed())
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        """Events that the thread has not done with."""
        return self._num_told - self._num_heard

    def begin_step(self, event: StepBegun) -> None:
        """Tell of a step, unless the thread is far behind."""
        self._skips = self.failed or self.num_waiting > MAX_WAITING
        self.num_skipped += self._skips
        self._outlooks.clear()
        if not self._skips:
            self._tell(event)

    def routed(self, event: LayerRouted) -> None:
        """Tell of the step's next layer."""
        if not self._skips:
            self._tell(event)

    def forget(self, owner: int) -> None:
        if not self.failed:
            self._tell(RequestEnded(owner))

    def outlook(self) -> Outlook | None:
        """The latest, if it is new."""
        try:
            return self._outlooks.pop()
        except IndexError:
            return None

    def _tell(self, event: Event) -> None:
        self._num_told += 1
        self._events.put(event)

    def _run(self) -> None:
        try:
            while self._take(self._events.get()):
                self._num_heard += 1
        except Exception:
            self.failed = True
            logger.exception("nothing is predicted any more; serving goes on without")

    def _take(self, event: Event) -> bool:
        """False after the last one."""
        match event:
            case StepBegun(step, tokens, times, late, unused):
                self.advisor.begin_step(step, tokens, times, late=late, unused=unused)
            case LayerRouted(routing, was_absent):
                self.advisor.observe(routing(), was_absent=was_absent)
            case RequestEnded(owner):
                self.advisor.forget(owner)
                return True
            case Closed():
                return False
            case _:
                assert_never(event)
        if self._events.empty():  # else what it would say is out of date
            self._outlooks.append(self.advisor.outlook())
        return True
