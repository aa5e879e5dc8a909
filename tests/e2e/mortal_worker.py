"""The worker, made to die of some requests: as it would of a bug that they hit."""

import os
import signal
from typing import Any

from sglmoe.protocol import StepPlan, StepResult
from sglmoe.worker.process import run_worker
from sglmoe.worker.worker import Worker

PILL = 1021  # a token; with it in its prompt, a request is the worker's end


def run_mortal_worker(*arguments: Any) -> None:
    """As `run_worker`, which see."""
    step = Worker.step

    def mortal_step(self: Worker, plan: StepPlan) -> StepResult:
        if any(PILL in self._requests[row.rid].tokens for row in plan.rows):
            os.kill(os.getpid(), signal.SIGSEGV)
        return step(self, plan)

    Worker.step = mortal_step  # type: ignore[method-assign]
    run_worker(*arguments)


def serve_with_mortal_workers() -> None:
    """To be called in the process of a server, before it starts."""
    from sglmoe import preparation
    from sglmoe.start_up import ChildEntry

    worker = ChildEntry("mortal_worker", "run_mortal_worker")
    preparation.scheduler_entry = lambda config: ChildEntry(
        "sglmoe.scheduler.process", "run_scheduler", config=config, run_worker=worker
    )
