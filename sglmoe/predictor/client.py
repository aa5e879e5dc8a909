"""The worker's side of the predictor: nobody waits for it, and what it can't be told at once it is not told."""

import logging
from collections import deque
from typing import Protocol

import msgspec
import numpy as np

from sglmoe.prediction.advisor import Outlook
from sglmoe.predictor.messages import (
    Advice,
    AdvisorReport,
    Answer,
    Closed,
    Event,
    Failed,
    LayerRouted,
    Ready,
    Status,
    StepBegun,
    Wishes,
)

logger = logging.getLogger(__name__)


class Line(Protocol):
    """To the predictor and back, without waiting."""

    def send(self, event: Event) -> bool:
        """False if it can't take more now, and has not."""

    def receive(self) -> Answer | None:
        """What it has said, in order; None if nothing more."""

    def death(self) -> str | None:
        """How it has ended; None as long as it lives."""

    def close(self) -> None:
        """Return when it is gone."""


class Coming(Protocol):
    """An event whose bytes may still be on their way from the device."""

    def is_there(self) -> bool: ...

    def event(self) -> Event: ...


class Said(msgspec.Struct, frozen=True):
    """One that has arrived."""

    its: Event

    def is_there(self) -> bool:
        return True

    def event(self) -> Event:
        return self.its


class PredictorClient:
    """Main thread only. `num_layers`, `num_experts` are the shape of what it is told of."""

    def __init__(self, line: Line, *, num_layers: int, num_experts: int):
        self._line = line
        self._shape = num_layers, num_experts
        self.wishes = Wishes()
        self.report = AdvisorReport()
        self.num_skipped = 0  # steps that it was not, or not wholly, told of
        self.failed = False
        self._coming: deque[Coming] = deque()
        self._skips = False  # the rest of a step

    def tell(self, coming: Coming) -> None:
        """Send it when it and all that was told before are there: see `outlook`."""
        if not self.failed:
            self._coming.append(coming)
            self._send_all()

    def outlook(self) -> Outlook | None:
        """The latest, if there is a new one."""
        self._send_all()
        latest: Advice | None = None
        while not self.failed and (answer := self._line.receive()) is not None:
            match answer:
                case Advice():
                    latest = answer
                case Status(wishes, report):
                    self.wishes = wishes
                    self.report = report or self.report
                case Failed(error):
                    self._fail(error)
                case Ready():
                    pass
        if latest is None:
            return None
        probabilities = np.frombuffer(latest.probabilities, np.float32).reshape(self._shape)
        return Outlook(latest.step, latest.layer, probabilities, list(latest.wanted))

    def check(self) -> None:
        """See whether it still lives: it may be told nothing for long."""
        if not self.failed and (death := self._line.death()) is not None:
            self._fail(death)

    def close(self) -> None:
        """End the predictor."""
        self._line.send(Closed())
        self._line.close()

    def _send_all(self) -> None:
        while self._coming and self._coming[0].is_there():
            self._send(self._coming.popleft().event())

    def _send(self, event: Event) -> None:
        if isinstance(event, StepBegun):
            self._skips = False
        if self._skips and isinstance(event, LayerRouted):
            return
        if self.failed or self._line.send(event):
            return
        self._skips = True
        self.num_skipped += 1
        self.check()

    def _fail(self, why: str) -> None:
        self.failed = True
        logger.error("nothing is predicted any more; serving goes on without. %s", why)
