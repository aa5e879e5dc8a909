"""The worker, made to die of some requests, as it would of a bug that they hit, and to draw by seed on a CPU too."""

import os
import signal
from typing import Any

from sglmoe.protocol import StepPlan, StepResult
from sglmoe.worker import process
from sglmoe.worker.worker import Worker

PILL = 1021  # a token; with it in its prompt, a request is the worker's end


def run_mortal_worker(*arguments: Any) -> None:
    """As `run_worker`, which see."""
    step, load_model = Worker.step, process.load_model

    def mortal_step(self: Worker, plan: StepPlan) -> StepResult:
        served = [self._requests[row.rid] for row in plan.rows]
        if any(PILL in request.tokens[: request.num_prompt] for request in served):
            os.kill(os.getpid(), signal.SIGSEGV)
        return step(self, plan)

    def load_model_that_heeds_seeds(*args: Any, **keywords: Any) -> Any:
        from sglang.srt.runtime_context import get_context

        loaded = load_model(*args, **keywords)
        # As a flag it would be refused: SGLang has batch-invariant kernels for accelerators only.
        # The sampler needs none of them.
        get_context().override("test", enable_deterministic_inference=True)
        return loaded

    Worker.step = mortal_step  # type: ignore[method-assign]
    process.load_model = load_model_that_heeds_seeds
    process.run_worker(*arguments)


def serve_with_mortal_workers() -> None:
    """To be called in the process of a server, before it starts."""
    from sglmoe import preparation
    from sglmoe.start_up import ChildEntry

    worker = ChildEntry("mortal_worker", "run_mortal_worker")
    preparation.scheduler_entry = lambda config, viewers: ChildEntry(
        "sglmoe.scheduler.process",
        "run_scheduler",
        config=config,
        run_worker=worker,
        viewers=viewers,
    )
