"""The worker, made to act on whatever predictors say: each of them in turn, step by step, the wrong ones too.

The product acts only as long as predictions come true (`Calibration`) and steps are shorter for it
(`Trial`), and listens to the best. That keeps wrong predictions out of memory, where a test wants them.
"""

from typing import Any

from sglmoe.prediction import advisor, forecast
from sglmoe.prediction.forecast import Forecast
from sglmoe.worker import predictors, prefetching
from sglmoe.worker.process import run_worker


class Always(prefetching.Trial):
    """Prefetching is on, whatever comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_on = True

    def step_done(self, num_rows: int, seconds: float) -> None:
        """No verdict."""


class InTurn(advisor.Advisor):
    """Listens to all of its predictors for ever, and tells what the next one says."""

    _step = -1  # before the first, when it is asked already

    @property
    def _first(self) -> Forecast:
        candidates = list(self._candidates.values())
        return candidates[self._step % len(candidates)].forecast

    def _pick_in_time(self) -> None:
        """No pick."""


def run_believing_worker(*arguments: Any) -> None:
    """As `run_worker`, which see; with `--expert-predictor auto`."""
    prefetching.Trial = Always  # type: ignore[misc]
    forecast.Calibration = lambda: None  # type: ignore[assignment, misc]
    predictors.Advisor = InTurn  # type: ignore[misc]
    known_makers = predictors.known_makers
    predictors.known_makers = lambda sources: (
        known_makers(sources) | predictors.wrong_makers(sources)
    )
    run_worker(*arguments)
