"""The worker's memory plan limits how many requests run. Against the scripted worker of
`test_scheduler.py`; pages abound, four may run by the flags."""

import logging

import pytest
from msgspec.structs import replace
from test_scheduler import NO_MEMORY, Stage, play

from sglmoe.protocol import Limits, ResidencyPlan, Row, StepResult
from sglmoe.scheduler.planner import Planner, limited
from sglmoe.scheduler.policy import NewTokenRatio, PolicySettings
from sglmoe.scheduler.request import State
from sglmoe.scheduler.roster import Roster


def with_limit(result: StepResult, limit: int | None) -> StepResult:
    plan = ResidencyPlan(running_limit=limit, reason="because.")
    return replace(result, snapshot=replace(result.snapshot, plan=plan))


class Limited(Stage):
    """A stage whose worker sends a plan with each answer."""

    limit: int | None = None

    async def hear(self, message: object) -> None:
        if isinstance(message, StepResult):
            message = with_limit(message, self.limit)
        await super().hear(message)  # type: ignore[arg-type]


def test_new_requests_wait_while_as_many_run_as_planned(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(stage: Stage) -> None:
        assert isinstance(stage, Limited)
        await stage.add("a", 4)
        stage.limit = 1
        await stage.answer(0, {"a": 50})
        b = await stage.add("b", 4)
        await stage.answer(1, {"a": 51}, computed={"a": 5})
        await stage.answer(2, {"a": 52}, computed={"a": 6})
        assert b.state is State.QUEUED
        assert all(row.rid == "a" for plan in stage.plans for row in plan.rows)
        stage.limit = None
        await stage.answer(3, {"a": 53}, computed={"a": 7})
        assert stage.plans[-1].rows == (Row("b", 4),)

    with caplog.at_level(logging.INFO, logger="sglmoe.scheduler.planner"):
        play(scene, kind=Limited)
    # Said once when it comes, and once when it goes.
    assert [record.message for record in caplog.records] == [
        "Memory plan: at most 1 running. because.",
        "Memory plan: no limit. because.",
    ]


def test_those_who_run_already_are_not_preempted() -> None:
    async def scene(stage: Stage) -> None:
        assert isinstance(stage, Limited)
        await stage.add("a", 4)
        await stage.add("b", 4)
        await stage.answer(0, {"a": 50})
        stage.limit = 1
        await stage.answer(1, {"a": 51}, computed={"a": 5})
        await stage.answer(2, {"b": 60}, computed={"b": 4})
        await stage.answer(3, {"a": 52, "b": 61}, computed={"a": 6, "b": 5})
        assert stage.plans[-1].rows == (Row("a", 1), Row("b", 1))
        assert all(plan.preempt == () for plan in stage.plans)

    play(scene, kind=Limited)


def test_priorities_preempt_at_the_planned_limit_as_at_that_of_the_flags() -> None:
    policy = PolicySettings(max_running=4, max_prefill_tokens=100, preemption_threshold=0)

    async def scene(stage: Stage) -> None:
        assert isinstance(stage, Limited)
        await stage.add("low", 4, priority=0)
        stage.limit = 1
        await stage.answer(0, {"low": 50})
        await stage.add("high", 4, priority=9)
        await stage.answer(1, {"low": 51}, computed={"low": 5})
        assert stage.plans[-1].preempt == ("low",)
        assert stage.plans[-1].rows == (Row("high", 4),)

    play(scene, kind=Limited, policy=policy, use_priority=True)


@pytest.mark.parametrize(("planned", "expected"), [(None, 4), (2, 2), (9, 4), (0, 1)])
def test_the_limit_lies_within_that_of_the_flags_and_one_may_always_run(
    planned: int | None, expected: int
) -> None:
    policy = PolicySettings(max_running=4, max_prefill_tokens=100)
    assert (
        limited(policy, replace(NO_MEMORY, plan=ResidencyPlan(running_limit=planned))).max_running
        == expected
    )


def test_a_new_worker_that_has_measured_nothing_sets_no_limit() -> None:
    planner = Planner(
        roster=Roster(use_priority=False, low_values_first=False),
        limits=Limits(0, 4, 8, 64, 100),
        snapshot=NO_MEMORY,
        policy=PolicySettings(max_running=4, max_prefill_tokens=100),
        ratio=NewTokenRatio(initial=0.7, minimum=0.1, decay=0.1),
    )
    assert planner.running_limit == 4
