"""Does prefetching pay? Decode steps with and without it take turns, and their times are compared."""

from collections.abc import Sequence
from enum import Enum
from statistics import median

import msgspec

# Arbitrary, all of these. Steps of a window, of which the first still run on what the one before left.
WINDOW_STEPS = 24
SETTLING_STEPS = 4
# Windows without and with, in turn, so many of each.
NUM_PAIRS = 5
# How much faster steps must be for prefetching to stay on.
MIN_GAIN_RATIO = 0.01
# Two windows are only compared if they decoded nearly as many rows a step.
MAX_ROWS_RATIO = 1.1
# Steps until the next trial; twice as many after each one that ended as the last.
HOLD_STEPS = 1024
MAX_HOLD_STEPS = 16384
# So long before a trial predictors are told of steps; before the first one, until one of them is picked.
WARM_UP_STEPS = 72
# The same as HOLD_STEPS after a trial that came to nothing; what the last one came to holds meanwhile.
RETRY_STEPS = 128


class Window(msgspec.Struct, frozen=True):
    """Decode steps in a row, all with prefetching or all without."""

    num_rows: int = 0
    num_steps: int = 0
    seconds: float = 0.0

    @property
    def mean_rows(self) -> float:
        return self.num_rows / self.num_steps

    @property
    def mean_seconds(self) -> float:
        return self.seconds / self.num_steps


class Verdict(Enum):
    """What a trial has come to."""

    PAYS = "pays"
    DOES_NOT_PAY = "does not pay"
    UNDECIDED = "undecided"  # the load changed all the time


def judge(pairs: Sequence[tuple[Window, Window]]) -> tuple[Verdict, float]:
    """From windows (without, with): whether it pays, and the median of how long a step with it takes,
    as a share of one without."""
    ratios = [
        on.mean_seconds / off.mean_seconds
        for off, on in pairs
        if 1 / MAX_ROWS_RATIO <= on.mean_rows / off.mean_rows <= MAX_ROWS_RATIO
    ]
    if 2 * len(ratios) <= len(pairs):
        return Verdict.UNDECIDED, 1.0
    ratio = median(ratios)
    return (Verdict.PAYS if ratio <= 1 - MIN_GAIN_RATIO else Verdict.DOES_NOT_PAY), ratio


class Trial:
    """Says for each decode step whether to prefetch. Begins with a trial; later ones are rarer as
    long as they come to the same.

    What is compared is with prediction and prefetching against without both: predicting takes time too.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.verdict = Verdict.UNDECIDED  # until one is reached
        self.ratio = 1.0  # of the last trial
        self._windows: list[Window] = []
        self._window = Window()
        self._num_settled = 0
        self._hold_steps = WARM_UP_STEPS  # until the next trial; 0 during one
        self._next_hold = HOLD_STEPS

    @property
    def is_resting(self) -> bool:
        """Nobody needs a prediction of this step, nor one soon."""
        is_warming_up = 0 < self._hold_steps <= WARM_UP_STEPS
        return not self.is_on and not is_warming_up

    def step_done(self, num_rows: int, seconds: float) -> Verdict | None:
        """A decode step has ended; what the trial has come to, if that ends one."""
        if self._hold_steps:
            self._hold_steps -= 1
            if not self._hold_steps:
                self.is_on = False
            return None
        if self._num_settled < SETTLING_STEPS:
            self._num_settled += 1
            return None
        window = self._window
        self._window = Window(
            window.num_rows + num_rows, window.num_steps + 1, window.seconds + seconds
        )
        return self._end_window() if self._window.num_steps == WINDOW_STEPS else None

    def _end_window(self) -> Verdict | None:
        self._windows.append(self._window)
        self._window, self._num_settled = Window(), 0
        self.is_on = len(self._windows) % 2 == 1
        return self._end() if len(self._windows) == 2 * NUM_PAIRS else None

    def _end(self) -> Verdict:
        pairs = list(zip(self._windows[0::2], self._windows[1::2], strict=True))
        verdict, self.ratio = judge(pairs)
        self._windows = []
        if verdict is Verdict.UNDECIDED:
            self._hold_steps = RETRY_STEPS
        else:
            same = verdict is self.verdict
            self._next_hold = min(2 * self._next_hold, MAX_HOLD_STEPS) if same else HOLD_STEPS
            self._hold_steps, self.verdict = self._next_hold, verdict
        self.is_on = self.verdict is Verdict.PAYS
        return verdict
