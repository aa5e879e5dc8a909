"""The worker with decode steps that are one graph each, which a stand-in for CUDA's has recorded, on a device that takes its
time: so steps begin behind others, as they do on a GPU. In a process of its own.
"""

import time
from typing import Any

from recorded_graphs import capture_on_cpu

from sglmoe.worker import model_runner, process
from sglmoe.worker.model_runner_passes import ReplayedPass

SIZES = [1, 2, 4, 8, 16]  # of captured steps
SECONDS = 0.02  # that a step is under way at least: the next plan comes meanwhile


class SlowPass(ReplayedPass):
    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        self._over_at = time.monotonic() + SECONDS

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._over_at


def run_following_worker(*arguments: Any) -> None:
    """As `run_worker`, which see."""
    load_model = process.load_model

    def load_and_capture(*args: Any, **keywords: Any) -> Any:
        capture_on_cpu(SIZES, "full")
        return load_model(*args, **keywords)

    process.load_model = load_and_capture
    model_runner.ReplayedPass = SlowPass  # type: ignore[misc]
    process.run_worker(*arguments)


def scheduler_entry(config: Any, viewers: Any = None) -> Any:
    """Of a scheduler with such workers."""
    from sglmoe.start_up import ChildEntry

    return ChildEntry(
        "sglmoe.scheduler.process",
        "run_scheduler",
        config=config,
        run_worker=ChildEntry("following_worker", "run_following_worker"),
        viewers=viewers,
    )


def have_steps_follow() -> None:
    """To be called in the process of an engine, before it starts."""
    from sglmoe import engine

    engine.scheduler_entry = scheduler_entry


def serve_with_following_workers() -> None:
    """To be called in the process of a server, before it starts."""
    from sglmoe import preparation

    preparation.scheduler_entry = scheduler_entry
