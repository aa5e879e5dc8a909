"""What viewers see, against the scripted worker of `test_scheduler.py`: who is asked when, and rates between two looks."""

import asyncio
import json
import socket
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace
from test_recovery import be_born, die
from test_scheduler import Stage, play, settle, snapshot

from sglmoe.live_view.state import LiveState, Prefetch
from sglmoe.protocol import CallDone, MemoryMap, PrefetchReport, ShowMemory
from sglmoe.scheduler import live_state, recovery
from sglmoe.scheduler.live_state import (
    LiveStates,
    Sample,
    answer,
    prefetch_state,
    rates_between,
    recent,
)
from sglmoe.scheduler.report import StepReport, Totals

DRAWN = MemoryMap(frames="ek..", residency=("r.",), heat=("z0",), heat_is="share")


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_state, "DRAWING_SECONDS", 0.01)
    monkeypatch.setattr(recovery, "PAUSE_SECONDS", 0.0)


class Watched(Stage):
    """A stage with somebody who looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.totals = Totals()
        self.states = LiveStates(
            scheduler=self.scheduler, totals=self.totals, model="tiny", clock=lambda: self.now
        )

    @property
    def asked(self) -> list[ShowMemory]:
        """What the worker was asked for a map."""
        return [call for call in self.channel.calls if isinstance(call, ShowMemory)]

    async def look(self, *, drawn: MemoryMap | None = None) -> LiveState:
        """Look once; the worker draws if it was given something to."""
        looking = asyncio.create_task(self.states.now(worker_pid=7))
        await settle()
        if drawn is not None:
            await self.hear(CallDone(self.asked[-1].call_id, success=True, memory=drawn))
        return await looking


def test_the_worker_is_asked_for_a_map_only_when_somebody_looks() -> None:
    async def scene(stage: Watched) -> None:
        await stage.add("a", 4)
        await stage.answer(0, {"a": 50})
        assert stage.asked == []
        state = await stage.look(drawn=DRAWN)
        assert len(stage.asked) == 1
        assert state.map is not None
        assert (state.map.frames, state.map.age_seconds) == ("ek..", 0)
        assert (state.model, state.worker.state, state.worker.pid) == ("tiny", "running", 7)
        assert (state.requests.running, state.requests.queued) == (1, 0)
        assert state.memory.page_tokens == 4

    play(scene, kind=Watched)


def test_a_busy_worker_is_asked_once_and_its_last_map_is_shown_with_its_age() -> None:
    async def scene(stage: Watched) -> None:
        assert (await stage.look()).map is None
        stage.now += 3
        assert (await stage.look()).map is None
        assert len(stage.asked) == 1, "it has not answered the first time"
        await stage.hear(CallDone(stage.asked[0].call_id, success=True, memory=DRAWN))
        stage.now += 2
        state = await stage.look()
        assert state.map is not None
        assert (len(stage.asked), state.map.age_seconds) == (2, 2)

    play(scene, kind=Watched)


def test_without_a_worker_the_scheduler_answers_and_there_is_no_map() -> None:
    async def scene(stage: Watched) -> None:
        await stage.look(drawn=DRAWN)
        await stage.add("a", 4)
        await die(stage, "killed by SIGKILL")
        stage.now += 1.5
        state = await stage.look()
        assert state.map is None
        assert (state.worker.state, state.worker.restarts) == ("restarting", 0)
        assert (state.worker.cause, state.worker.lost_seconds) == ("killed by SIGKILL", 1.5)
        assert (state.requests.running, state.requests.queued) == (0, 1)
        stage.now += 0.5
        await be_born(stage)
        state = await stage.look(drawn=DRAWN)
        assert (state.worker.state, state.worker.restarts) == ("running", 1)
        assert (state.worker.restart_seconds, state.worker.lost_seconds) == (2, 0)
        assert state.map is not None

    play(scene, kind=Watched)


def test_a_worker_that_dies_over_the_drawing_leaves_no_map() -> None:
    async def scene(stage: Watched) -> None:
        await stage.look()
        await die(stage)
        await be_born(stage)
        state = await stage.look(drawn=DRAWN)
        assert (state.map is not None, len(stage.asked)) == (True, 2)

    play(scene, kind=Watched)


def test_rates_are_those_since_the_look_before() -> None:
    async def scene(stage: Watched) -> None:
        assert (await stage.look()).rates is None
        stage.now += 2
        stage.totals.decoded_tokens += 30
        state = await stage.look()
        assert state.rates is not None
        assert (state.rates.seconds, state.rates.decode_tokens_per_second) == (2, 15)
        stage.now += 60  # long ago
        assert (await stage.look()).rates is None

    play(scene, kind=Watched)


# ----------------------------------------------------------------------------------------------------------------- rates


def sample(at: float, *, restarts: int = 0, totals: Totals | None = None, **counts: Any) -> Sample:
    return Sample(at, restarts, totals or Totals(), replace(snapshot(), **counts))


def test_rates_between_two_samples() -> None:
    before = sample(
        10,
        totals=Totals(decoded_tokens=100, prompt_tokens=50, step_seconds=5),
        expert_hits=10,
        expert_misses=10,
        stall_seconds=1.0,
        host_hits=1,
        expert_bytes_moved=1000,
    )
    after = sample(
        14,
        totals=Totals(decoded_tokens=140, prompt_tokens=250, step_seconds=7),
        expert_hits=40,
        expert_misses=20,
        stall_seconds=1.5,
        host_hits=5,
        expert_bytes_moved=5000,
    )
    rates = rates_between(before, after)
    assert rates is not None
    assert (rates.seconds, rates.decode_tokens_per_second, rates.prompt_tokens_per_second) == (
        4,
        10,
        50,
    )
    assert (rates.busy_ratio, rates.stall_ratio) == (0.5, 0.25)
    assert (rates.hit_ratio, rates.host_ratio) == (0.75, 0.4)
    assert rates.expert_bytes_per_second == 1000


def test_totals_count_what_steps_report() -> None:
    totals = Totals()
    for _ in range(2):
        totals.count(
            StepReport(
                snapshot=snapshot(),
                step_seconds=0.5,
                num_admitted=1,
                prefill_tokens=10,
                cached_tokens=4,
                decode_tokens=3,
                num_rejected=2,
                num_preempted=1,
            )
        )
    assert totals == Totals(6, 20, 1.0, 4, 2)


def test_ratios_of_nothing_are_none_and_no_time_gives_no_rates() -> None:
    rates = rates_between(sample(0), sample(1))
    assert rates is not None
    assert (rates.hit_ratio, rates.stall_ratio, rates.host_ratio) == (None, None, None)
    assert rates.busy_ratio == 0
    assert rates_between(sample(1), sample(1)) is None


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ([], 10.0),  # nobody has looked: the latest alone
        ([9.6], 9.6),
        ([6.0, 7.5, 7.9, 8.5], 7.9),  # the last that is 2 seconds old
        ([-1.0, 9.0], 9.0),  # nobody had looked for long
        ([9.0, 9.5], 9.0),
    ],
)
def test_rates_are_taken_over_two_seconds_where_somebody_has_looked_for_so_long(
    looks: Sequence[float], expected: float
) -> None:
    kept = recent([sample(at) for at in looks], sample(10.0))
    assert kept[0].at == expected


def test_counts_of_a_worker_that_is_gone_are_not_compared() -> None:
    latest = sample(10, restarts=1)
    assert recent([sample(8), sample(9, restarts=1)], latest)[0].at == 9
    assert recent([sample(8)], latest) == [latest]


def test_predictions_that_were_not_scored_yet_have_no_precision() -> None:
    assert prefetch_state(PrefetchReport()) == Prefetch("off", False, "", None, None)
    scored = prefetch_state(PrefetchReport(mode="on", precision=0.5, recall=0.0))
    assert (scored.precision, scored.recall) == (0.5, 0)


# -------------------------------------------------------------------------------------------------------------- the line


def test_a_line_is_answered_for_every_line_until_the_other_end_is_gone() -> None:
    async def scene(stage: Watched) -> None:
        ours, theirs = socket.socketpair()
        answering = asyncio.create_task(answer(theirs, lambda: stage.look()))
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        for _ in range(2):
            writer.write(b"\n")
            assert json.loads(await reader.readline())["model"] == "tiny"
        writer.close()
        await asyncio.wait_for(answering, 5)

    play(scene, kind=Watched)
