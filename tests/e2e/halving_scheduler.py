"""The scheduler, made to decode in two halves that take turns at every step, whether that pays or not."""

from typing import Any

from msgspec.structs import replace

from sglmoe.scheduler import planner
from sglmoe.scheduler.halves import Turns
from sglmoe.scheduler.policy import Decision
from sglmoe.scheduler.process import run_scheduler


def run_halving_scheduler(*arguments: Any, **keywords: Any) -> None:
    """As `run_scheduler`, which see."""
    plan_step, turns = planner.plan_step, Turns(1)

    def plan_half(**now: Any) -> Decision:
        decision = plan_step(**now)
        if decision.only_prompts or not decision.plan.rows:
            return decision
        rids = [row.rid for row in decision.plan.rows]
        if turns.round_is_over:
            turns.begin_round(rids[::2], rids[1::2])
        decoding = turns.next_step(rids)
        rows = tuple(row for row in decision.plan.rows if row.rid in decoding)
        return decision._replace(plan=replace(decision.plan, rows=rows))

    planner.plan_step = plan_half  # type: ignore[assignment]
    run_scheduler(*arguments, **keywords)


def decode_in_halves() -> None:
    """To be called in the process of an engine, before it starts."""
    from sglmoe import engine
    from sglmoe.start_up import ChildEntry

    worker = ChildEntry("sglmoe.worker.process", "run_worker")
    engine.scheduler_entry = lambda config: ChildEntry(
        "halving_scheduler", "run_halving_scheduler", config=config, run_worker=worker
    )
