"""Workers die and others take their place, against the scripted worker of `test_scheduler.py`.

Pages hold 4 tokens, four requests may run. Step numbers go on from worker to worker.
"""

import asyncio
from array import array
from typing import Any

import pytest
from msgspec.structs import replace
from test_scheduler import LIMITS, Stage, play, settle, snapshot

from sglmoe.protocol import (
    PROTOCOL_VERSION,
    CallDone,
    Limits,
    LogprobSpec,
    RequestReady,
    Row,
    RowResult,
    StepResult,
    TokenLogprobs,
    WorkerFailed,
    WorkerReady,
)
from sglmoe.scheduler import recovery
from sglmoe.scheduler.finish import StopRules, aborted
from sglmoe.scheduler.request import Request, State
from sglmoe.scheduler.seams import WorkerLost


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "PAUSE_SECONDS", 0.0)


async def die(stage: Stage, cause: str = "killed by SIGKILL") -> None:
    await stage.hear(WorkerFailed(cause))


async def be_born(stage: Stage, limits: Limits = LIMITS) -> None:
    ready = WorkerReady(PROTOCOL_VERSION, limits, snapshot(), 0.5, "another one")
    stage.channel.births.put_nowait(ready)
    await settle()


async def die_and_be_born(stage: Stage) -> None:
    await die(stage)
    await be_born(stage)


def generated(stage: Stage, rid: str) -> list[int]:
    """The output that the present worker was told of when it was told of the request."""
    (spec,) = [spec for spec in stage.channel.announced if spec.rid == rid]
    return array("i", spec.output_ids).tolist()


# ------------------------------------------------------------------------------------------------------ requests go on


def test_a_running_request_goes_on_where_it_was() -> None:
    async def scene(stage: Stage) -> None:
        a = await stage.add("a", 4)
        await stage.answer(0, {"a": 50})
        await stage.answer(1, {"a": 51}, computed={"a": 5})  # steps 2 and 3 are under way
        await die(stage)
        assert (a.state, a.num_computed, a.in_flight) == (State.QUEUED, 0, [])
        await be_born(stage)
        assert generated(stage, "a") == [50, 51]
        # Four of the prompt, two of its own; and the next one ahead, as always.
        assert [plan.rows for plan in stage.plans] == [(Row("a", 6),), (Row("a", 1),)]
        assert [plan.step_id for plan in stage.plans] == [4, 5]
        await stage.answer(4, {"a": 52}, computed={"a": 6})
        assert stage.client.outputs["a"] == [50, 51, 52]
        assert a.num_retractions == 1

    play(scene)


def test_what_the_dead_worker_still_said_counts_once() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        row = RowResult(rid="a", num_computed=4, num_cached=0, token_id=50)
        stage.channel.say(StepResult(0, (row,), (), (), {}, snapshot(), 0.01))
        await die(stage)  # right behind it
        await be_born(stage)
        assert generated(stage, "a") == [50]
        assert stage.client.outputs["a"] == [50]

    play(scene)


def test_the_queue_keeps_its_order_and_new_requests_join_its_end() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 16)
        await stage.add("b", 4)
        await die(stage)
        await stage.add("c", 4)
        assert stage.channel.added == ["a", "b"]  # to the old one; "c" waits for a new one
        await be_born(stage)
        assert stage.channel.added == ["a", "b", "c"]
        assert [request.rid for request in stage.scheduler.roster.running] == ["a"]
        assert [request.rid for request in stage.scheduler.roster.queue] == ["b", "c"]

    play(scene)


def test_aborting_works_while_there_is_no_worker() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        await stage.add("b", 4)
        await die(stage)
        stage.scheduler.abort(lambda request: request.rid == "a", aborted("Aborted"))
        await settle()
        assert stage.client.refused["a"].message == "Aborted"
        await be_born(stage)
        # The new worker hears neither of the request nor of its end.
        assert stage.channel.added == ["b"]
        assert all(plan.drop == () for plan in stage.plans)

    play(scene)


def test_whom_the_dead_worker_should_have_forgotten_is_forgotten() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4, max_new_tokens=1)
        await stage.answer(0, {"a": 50})
        assert stage.plans[1].drop == ("a",)
        again = await stage.add("a", 6)  # held back until the worker has answered that
        await die_and_be_born(stage)
        assert stage.channel.added == ["a"]
        assert stage.plans[0].rows == (Row("a", 6),)
        assert stage.plans[0].drop == ()
        assert again.state is State.RUNNING

    play(scene)


def test_a_retraction_that_the_dead_worker_did_not_hear_of_is_void() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        stage.scheduler.pause(retract=True)
        await die_and_be_born(stage)
        assert stage.plans == []  # still paused
        stage.scheduler.resume()
        await settle()
        assert (stage.plans[0].rows, stage.plans[0].preempt) == ((Row("a", 4),), ())

    play(scene)


def test_a_grammar_is_compiled_again_before_its_request_goes_on() -> None:
    async def scene(stage: Stage) -> None:
        a = await stage.add("a", 4, has_grammar=True)
        await stage.hear(RequestReady("a"))
        await stage.answer(0, {"a": 50})
        await die_and_be_born(stage)
        assert (a.state, generated(stage, "a")) == (State.PREPARING, [50])
        assert stage.plans == []
        await stage.hear(RequestReady("a"))
        assert stage.plans[0].rows == (Row("a", 5),)

    play(scene)


def test_memory_that_was_short_is_not_any_more() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 8)
        await stage.add("b", 4)
        await stage.answer(0, {"a": 50}, computed={"a": 8})
        await stage.answer(1, {"a": 51}, computed={"a": 9})
        await stage.answer(2, {}, rejected=("b",), available_pages=0)
        await die_and_be_born(stage)
        assert stage.plans[0].rows == (Row("a", 8),)
        assert stage.plans[1].rows == (Row("a", 2), Row("b", 4))

    play(scene)


def test_only_who_does_not_fit_a_smaller_worker_is_failed() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("large", 30, max_new_tokens=30)
        await stage.add("small", 4)
        await die(stage)
        await be_born(stage, replace(LIMITS, total_tokens=40, max_running=1))
        assert stage.client.refused["large"].status == 503
        assert "60 tokens" in stage.client.refused["large"].message
        assert "holds 40" in stage.client.refused["large"].message
        assert stage.channel.added == ["small"]
        assert stage.scheduler.limits.total_tokens == 40
        await stage.add("another", 4)
        await stage.answer(stage.plans[0].step_id, {"small": 50})
        assert all(row.rid == "small" for plan in stage.plans for row in plan.rows)

    play(scene)


def test_calls_are_answered_with_the_death_and_refused_until_another_serves() -> None:
    async def scene(stage: Stage) -> None:
        flushing = asyncio.create_task(stage.scheduler.flush_cache())
        await settle()
        await die(stage)
        assert (await flushing).message == "the worker was lost, ask again: killed by SIGKILL"
        meanwhile = await stage.scheduler.flush_cache()
        assert (meanwhile.success, meanwhile.message) == (
            False,
            "the worker is being replaced; ask again",
        )
        await be_born(stage)
        flushing = asyncio.create_task(stage.scheduler.flush_cache())
        await settle()
        await stage.hear(CallDone(stage.channel.calls[-1].call_id, success=True))
        assert (await flushing).success

    play(scene)


def test_who_ran_before_has_not_waited_since_it_came() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("ran", 4)
        await stage.answer(0, {"ran": 50})
        stage.now += 6
        await die(stage)
        await stage.add("new", 4)
        stage.now += 6
        stage.scheduler.check_clocks()
        await settle()
        assert list(stage.client.refused) == ["new"]

    play(scene, waiting_timeout_seconds=5)


def test_a_worker_that_answers_nothing_is_killed_and_replaced() -> None:
    async def scene(stage: Stage) -> None:
        stage.now += 1000  # idle as long as you like
        stage.scheduler.check_clocks()
        await stage.add("a", 4)
        stage.now += 29
        stage.scheduler.check_clocks()
        await settle()
        assert not stage.scheduler.recovery.is_under_way
        stage.now += 2
        stage.scheduler.check_clocks()
        await settle()
        cause = "the worker made no progress for 30 s in step 0 (--watchdog-timeout)"
        assert stage.scheduler.recovery.restarts.cause == cause
        await be_born(stage)
        assert stage.plans[0].rows == (Row("a", 4),)

    play(scene, watchdog_seconds=30)


def test_what_is_told_of_it() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        await die(stage, "SIGSEGV")
        assert stage.scheduler.awaits_worker
        stage.now += 3
        await be_born(stage)
        told = stage.client.restarts[0]
        assert (told.count, told.cause, told.ready_seconds) == (1, "SIGSEGV", 3.0)
        stage.now += 1
        await stage.answer(2, {"a": 50})
        stage.now += 1
        await stage.answer(3, {"a": 51}, computed={"a": 5})
        assert stage.scheduler.recovery.restarts.token_seconds == 4.0
        await die_and_be_born(stage)
        assert stage.scheduler.recovery.restarts.token_seconds == 0.0

    play(scene)


# --------------------------------------------------------------------------------------------- no worker can be had


def test_the_server_ends_when_no_worker_starts() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        await die(stage)
        for _ in range(3):
            assert "a" not in stage.client.refused
            stage.channel.births.put_nowait(WorkerLost("no memory; lower --memory-budget"))
            await settle()
        assert stage.client.refused["a"].status == 500
        assert "3 workers in a row" in stage.client.refused["a"].message

    with pytest.raises(WorkerLost, match="the last one so: no memory; lower --memory-budget"):
        play(scene)


def test_a_worker_that_dies_again_and_again_with_nothing_to_do_ends_the_server() -> None:
    async def scene(stage: Stage) -> None:
        await die_and_be_born(stage)
        await die_and_be_born(stage)
        await die(stage)

    with pytest.raises(WorkerLost, match="3 workers in a row ended before they served anything"):
        play(scene)


def test_one_served_step_makes_good_for_failed_starts() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4)
        for round_ in range(3):
            await die(stage)
            for _ in range(2):
                stage.channel.births.put_nowait(WorkerLost("not yet"))
            await be_born(stage)
            await stage.answer(stage.plans[0].step_id, {"a": 50}, computed={"a": 4 + round_})
        assert len(stage.client.outputs["a"]) == 3

    play(scene)


# --------------------------------------------------------------------------------------------------------- who did it


def test_a_request_that_kills_alone_is_failed_alone_at_the_third_death() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("pill", 4)
        await die_and_be_born(stage)
        await die_and_be_born(stage)
        assert "pill" not in stage.client.refused
        await stage.add("b", 4)  # must wait for the outcome
        assert stage.channel.added == ["pill"]
        await die(stage, "SIGSEGV")
        assert stage.client.refused["pill"].status == 500
        assert "died 3 times in a row" in stage.client.refused["pill"].message
        assert "SIGSEGV" in stage.client.refused["pill"].message
        await be_born(stage)
        assert stage.channel.added == ["b"]
        assert stage.scheduler.recovery.restarts.failed_requests == 1

    play(scene)


def test_of_a_batch_each_is_tried_alone_and_only_the_killer_is_failed() -> None:
    async def scene(stage: Stage) -> None:
        stage.scheduler.pause(retract=False)
        for rid in ("a", "pill", "c"):
            await stage.add(rid, 2)
        stage.scheduler.resume()
        await settle()
        assert [row.rid for row in stage.plans[0].rows] == ["a", "pill", "c"]
        await die_and_be_born(stage)
        # The first death may have had any cause: all go on together.
        assert [row.rid for row in stage.plans[0].rows] == ["a", "pill", "c"]
        await die_and_be_born(stage)
        assert stage.channel.added == ["a"]
        step = stage.plans[0].step_id
        await stage.answer(step, {"a": 50}, computed={"a": 2})
        # "a" got a step further than ever. It makes room for the next suspect, which is alone again.
        assert stage.channel.added == ["a", "pill"]
        assert (stage.plans[2].rows, stage.plans[2].preempt) == ((Row("pill", 2),), ("a",))
        await stage.answer(step + 1, {"a": 51}, computed={"a": 3})
        await die_and_be_born(stage)
        assert list(stage.client.refused) == ["pill"]
        # "c" is left to be tried.
        assert stage.channel.added == ["c"]
        await stage.answer(stage.plans[0].step_id, {"c": 70}, computed={"c": 2})
        assert sorted(stage.channel.added) == ["a", "c"]
        assert [row.rid for row in stage.plans[-1].rows] == ["a"]
        assert generated(stage, "a") == [50, 51]

    play(scene)


def test_getting_further_clears_a_request() -> None:
    async def scene(stage: Stage) -> None:
        a = await stage.add("a", 4)
        for round_ in range(3):
            await die_and_be_born(stage)
            await die_and_be_born(stage)
            assert a.num_deaths == 2
            step_id = stage.plans[0].step_id
            await stage.answer(step_id, {"a": 50}, computed={"a": 4 + round_})
            assert a.num_deaths == 0
        assert stage.client.outputs["a"] == [50, 50, 50]

    play(scene)


def test_computing_again_what_was_computed_before_clears_nobody() -> None:
    async def scene(stage: Stage) -> None:
        a = await stage.add("a", 16)  # in chunks of 8
        await stage.answer(0, {"a": None}, computed={"a": 8})
        await stage.answer(1, {"a": 50}, computed={"a": 16})
        # The next step kills; before it, the prompt is computed again each time.
        for deaths in (1, 2, 3):
            await die_and_be_born(stage)
            assert a.num_deaths == deaths
            if not a.finished:
                step_id = stage.plans[0].step_id
                await stage.answer(step_id, {"a": None}, computed={"a": 8})
        assert stage.client.refused["a"].status == 500

    play(scene)


def test_a_grammar_that_kills_the_worker_is_found_too() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("pill", 4, has_grammar=True)
        await stage.add("fine", 4, has_grammar=True)
        await die_and_be_born(stage)
        assert stage.channel.added == ["pill", "fine"]
        await stage.hear(RequestReady("fine"))
        await die_and_be_born(stage)
        assert stage.channel.added == ["pill"]
        await die_and_be_born(stage)
        assert list(stage.client.refused) == ["pill"]
        await stage.hear(RequestReady("fine"))
        assert stage.plans[0].rows == (Row("fine", 4),)

    play(scene)


def test_a_grammar_that_compiles_every_time_clears_nobody_of_what_comes_after() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("pill", 4, has_grammar=True)
        for _ in range(3):
            await stage.hear(RequestReady("pill"))
            await die_and_be_born(stage)
        assert stage.client.refused["pill"].status == 500

    play(scene)


def test_a_grammar_that_never_compiles_holds_nobody_up_for_ever() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("pill", 4, has_grammar=True)
        stage.now += 1000  # beside others it may take as long as it likes
        stage.scheduler.check_clocks()
        await settle()
        await die_and_be_born(stage)
        await die(stage)
        stage.now += 1000  # so may the next worker
        stage.scheduler.check_clocks()
        await be_born(stage)
        stage.now += 29
        await stage.add("b", 4)  # waits, as the other is on trial, and buys that no time
        stage.scheduler.check_clocks()
        await settle()
        assert "pill" not in stage.client.refused
        stage.now += 2
        stage.scheduler.check_clocks()
        await settle()
        assert "no progress for 30 s in a grammar" in stage.client.refused["pill"].message
        await be_born(stage)
        assert stage.plans[0].rows == (Row("b", 4),)

    play(scene, watchdog_seconds=30)


def test_a_suspect_that_is_aborted_holds_nobody_up() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("pill", 4)
        await stage.add("b", 4)
        await die_and_be_born(stage)
        await die_and_be_born(stage)
        assert stage.channel.added == ["pill"]
        stage.scheduler.abort(lambda request: request.rid == "pill", aborted("Aborted"))
        await settle()
        await stage.answer(stage.plans[0].step_id, {})
        assert stage.channel.added == ["pill", "b"]
        assert stage.plans[-1].rows == (Row("b", 4),)

    play(scene)


def test_a_request_that_ended_is_not_blamed() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("pill", 4)
        await die_and_be_born(stage)
        await die_and_be_born(stage)
        stage.scheduler.abort(lambda request: request.rid == "pill", aborted("Aborted"))
        await settle()
        await die_and_be_born(stage)
        assert stage.client.ends["pill"].message == "Aborted"
        assert stage.scheduler.recovery.restarts.failed_requests == 0

    play(scene)


@pytest.mark.parametrize(("last_begun", "blamed"), [(0, "a"), (1, "a"), (2, "b")])
def test_the_blame_is_for_the_step_that_was_begun_last(last_begun: int, blamed: str) -> None:
    """Whether or not the answer to the one before has left the worker; of the next one, if it died between two."""

    async def scene(stage: Stage) -> None:
        a = await stage.add("a", 4)
        b = await stage.add("b", 4)
        await stage.answer(0, {"a": 50})
        assert [plan.rows for plan in stage.plans[1:]] == [(Row("a", 1),), (Row("b", 4),)]
        stage.channel.last_begun = last_begun
        await die(stage)
        assert {"a": a.num_deaths, "b": b.num_deaths} == {"a": 0, "b": 0, blamed: 1}

    play(scene)


def test_a_plan_without_rows_hides_nobody() -> None:
    async def scene(stage: Stage) -> None:
        await stage.add("a", 4, max_new_tokens=1)
        await stage.answer(0, {"a": 50})
        b = await stage.add("b", 4)
        assert (stage.plans[1].drop, stage.plans[1].rows) == (("a",), ())
        await die(stage)
        assert b.num_deaths == 1

    play(scene)


# ------------------------------------------------------------------------------------- what a new worker is told of one


def make(**facts: Any) -> Request:
    rules = StopRules(max_new_tokens=5, vocab_size=100)
    return Request(rid="r", prompt_ids=array("q", range(4)), stop=rules, **facts)


def test_what_was_cached_is_not_known_of_a_new_worker() -> None:
    request = make(probed_cached=3)
    request.lose_worker()
    assert request.probed_cached is None


def test_prompt_logprobs_are_asked_for_again_unless_they_were_whole() -> None:
    spec = LogprobSpec(start=1, num_top=0, token_ids=None)
    tokens = tuple(TokenLogprobs(i, -float(i)) for i in (1, 2, 3))
    request = make(logprobs=spec)
    request.record_prompt_logprobs(tokens[:2])  # then the worker dies
    request.lose_worker()
    assert request.announcement().logprobs == spec
    request.record_prompt_logprobs(tokens)
    assert request.input_logprobs is not None
    assert request.input_logprobs.ids == [1, 2, 3]
    request.lose_worker()
    assert request.announcement().logprobs == replace(spec, start=4)
    assert request.input_logprobs.values == [None, -2.0, -3.0]
