"""The scheduler, made to hold prompts back for a while whenever anybody decodes, whether that pays or not."""

from typing import Any

from sglmoe.scheduler import policy
from sglmoe.scheduler.passes import Held, Pass
from sglmoe.scheduler.process import run_scheduler

HELD_SECONDS = 0.1  # several steps of a tiny model


def run_holding_scheduler(*arguments: Any, **keywords: Any) -> None:
    """As `run_scheduler`, which see."""

    def should_wait(ready: Pass, *, held: Held, **now: Any) -> bool:
        return ready.num_decoding > 0 and held.seconds < HELD_SECONDS

    policy.should_wait = should_wait
    run_scheduler(*arguments, **keywords)


def hold_prompts_back() -> None:
    """To be called in the process of an engine, before it starts."""
    from sglmoe import engine
    from sglmoe.start_up import ChildEntry

    worker = ChildEntry("sglmoe.worker.process", "run_worker")
    engine.scheduler_entry = lambda config: ChildEntry(
        "holding_scheduler", "run_holding_scheduler", config=config, run_worker=worker
    )
