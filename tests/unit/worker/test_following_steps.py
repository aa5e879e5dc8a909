"""Steps that begin before the one in front of them has said what it sampled: as if each had been finished first.

A request "a" of 4 tokens and "b" of 5; a page has 4 tokens, a frame two pages.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from test_worker import Bench, CountingModel, new_request

from sglmoe.protocol import Row, StepPlan, StepResult
from sglmoe.worker.request import BatchRow
from sglmoe.worker.seams import Done, Pass, RowOutput
from sglmoe.worker.worker import TO_COME, RunningStep

A, B = ("a", 1), ("b", 1)


class Later:
    """A pass whose tokens the model knows at once, and the worker when it asks."""

    is_over = False

    def __init__(self, rows: Sequence[BatchRow], tokens: Sequence[int], log: list[str]):
        self.rows = rows
        self.tokens = tokens
        self.may_be_followed = True
        self._log = log

    def outputs(self, *, is_followed: bool) -> list[RowOutput]:
        self._log.append("known, and followed" if is_followed else "known")
        return [RowOutput(token_id=token) for token in self.tokens]


class LaterModel(CountingModel):
    """What it samples hangs on what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.may_be_followed = True

    def begin(self, rows: Sequence[BatchRow]) -> Pass:
        if not all(row.decodes for row in rows):
            return super().begin(rows)
        return self._begin(rows, [row.request.tokens[row.start] for row in rows])

    def follow(self, rows: Sequence[BatchRow], before: Pass) -> Pass:
        assert isinstance(before, Later)
        assert [row.request.tokens[row.start] for row in rows] == [TO_COME] * len(rows)
        return self._begin(rows, before.tokens)

    def _begin(self, rows: Sequence[BatchRow], read: Sequence[int]) -> Later:
        self.log.append("begin")
        self.computed = [(row.request.rid, row.start, row.stop) for row in rows]
        tokens = [row.stop + 3 * token for row, token in zip(rows, read, strict=True)]
        its = Later(rows, tokens, self.log)
        its.may_be_followed = self.may_be_followed
        return its


class FollowingBench(Bench):
    """Both requests have sampled their first token."""

    def __init__(self) -> None:
        super().__init__()
        self.model: LaterModel = LaterModel()
        self.worker._model = self.model
        self.add("a", range(4), max_new_tokens=50)
        self.add("b", range(10, 15), max_new_tokens=50)
        self.step(("a", 4), ("b", 5))

    def plan(self, *rows: tuple[str, int], **fields: tuple[str, ...]) -> StepPlan:
        self.num_steps += 1
        return StepPlan(self.num_steps, tuple(Row(*row) for row in rows), **fields)

    def follow(self, plan: StepPlan, step: RunningStep) -> RunningStep:
        following = self.worker.follow(plan, step)
        assert following is not None
        assert self.memory.violations() == []
        return following

    def steps(self, num_steps: int) -> list[StepResult]:
        """Each follows the one before where it can."""
        running, results = self.worker.begin(self.plan(A, B)), []
        for _ in range(num_steps - 1):
            plan = self.plan(A, B)
            following = self.worker.follow(plan, running)
            results.append(self.worker.finish(running, is_followed=following is not None))
            running = following or self.worker.begin(plan)
        return [*results, self.worker.finish(running)]


def test_the_same_is_sampled_and_stands_in_the_same_places() -> None:
    one_by_one, overlapped = FollowingBench(), FollowingBench()
    expected = [one_by_one.step(A, B) for _ in range(9)]  # over a page's end and a frame's
    results = overlapped.steps(9)
    assert [its.rows for its in results] == [its.rows for its in expected]
    assert [its.step_id for its in results] == [its.step_id for its in expected]
    assert overlapped.model.table == one_by_one.model.table
    assert overlapped.memory.snapshot(0) == one_by_one.memory.snapshot(0)
    for rid in ("a", "b"):
        its, other = (bench.worker._requests[rid] for bench in (overlapped, one_by_one))
        assert its.tokens == other.tokens
        assert TO_COME not in its.tokens
        assert its.num_computed == other.num_computed


def test_the_next_step_begins_before_the_last_one_is_known() -> None:
    bench = FollowingBench()
    first = bench.worker.begin(bench.plan(A, B))
    second = bench.follow(bench.plan(A, B), first)
    bench.worker.finish(first, is_followed=True)
    third = bench.follow(bench.plan(A, B), second)
    bench.worker.finish(second, is_followed=True)
    bench.worker.finish(third)
    followed = "known, and followed"
    assert bench.model.log == ["begin", "begin", followed, "begin", followed, "known"]


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        ((A,), {}),
        ((B, A), {}),
        ((A, B, ("new", 4)), {}),
        ((A, B), {"drop": ("old",)}),
        ((A, B), {"preempt": ("old",)}),
        ((A, B), {"probe": ("old",)}),
        ((), {}),
    ],
)
def test_other_plans_have_to_wait(rows: Any, fields: dict[str, Any]) -> None:
    bench = FollowingBench()
    for rid in ("old", "new"):
        bench.worker.add(new_request(rid, range(20, 24)))
    running = bench.worker.begin(bench.plan(A, B))
    computed, before = bench.model.computed, bench.memory.snapshot(0)
    assert bench.worker.follow(bench.plan(*rows, **fields), running) is None
    assert bench.model.computed == computed
    assert bench.memory.snapshot(0) == before
    tokens = [row.token_id for row in bench.worker.finish(running).rows]
    assert None not in tokens
    assert TO_COME not in bench.worker._requests["a"].tokens


def test_pages_of_steps_to_come_are_at_hand_but_no_more_than_can_be_needed() -> None:
    """a wants 50 tokens, c three: for it the last of what it computes is its sixth position."""
    bench = FollowingBench()
    bench.add("c", range(20, 24), max_new_tokens=3)
    bench.step(("c", 4))
    bench.model.num_behind = 9
    bench.step(A, ("c", 1))  # fifth positions
    assert len(bench.memory.pages("a")) == 4  # of 5 + 9 tokens
    assert len(bench.memory.pages("c")) == 2
    results = [bench.worker.begin(bench.plan(A, ("c", 1)))]
    assert bench.worker.follow(bench.plan(A, ("c", 1)), results[0]) is not None


def test_nobody_is_turned_away_for_pages_of_steps_to_come() -> None:
    """KV has 12 pages: 4 of a and b, 8 of c, which is the last in its plan and in need of one."""
    bench = FollowingBench()
    bench.add("c", range(30, 58), max_new_tokens=50)
    bench.step(("c", 28))
    bench.model.num_behind = 30
    result = bench.step(A, B, ("c", 1))
    assert [row.rid for row in result.rows] == ["a", "b", "c"]
    assert not result.rejected


def test_while_prompts_are_computed_nothing_is_kept_for_steps_to_come() -> None:
    bench = FollowingBench()
    bench.add("c", range(30, 34))
    bench.model.num_behind = 9
    bench.step(A, ("c", 4))
    assert len(bench.memory.pages("a")) == 2


def test_a_step_that_needs_a_frame_has_to_wait() -> None:
    """Each has a frame, full with 8 tokens, and then none at hand."""
    bench = FollowingBench()
    for _ in range(3):
        bench.step(A, B)
    assert bench.memory.snapshot(0).free_pages == 0
    running = bench.worker.begin(bench.plan(A))  # its eighth position
    assert bench.worker.follow(bench.plan(A), running) is None
    bench.worker.finish(running)
    assert bench.step(A).rows, "and gets one then"


def test_what_cant_be_followed_is_not() -> None:
    bench = FollowingBench()
    bench.model.may_be_followed = False
    running = bench.worker.begin(bench.plan(A, B))
    assert bench.worker.follow(bench.plan(A, B), running) is None
    prefill = bench.worker.begin(bench.plan())
    assert prefill.is_over
    assert bench.worker.follow(bench.plan(A, B), prefill) is None
    assert not RunningStep(bench.plan(), 0.0, (), running.kind, Done([])).may_be_followed


def test_frames_that_hold_packed_experts_are_planned_between_steps() -> None:
    bench = FollowingBench()
    bench.worker._packed = SimpleNamespace(step_done=lambda *_: None)  # type: ignore[assignment]
    running = bench.worker.begin(bench.plan(A, B))
    assert bench.worker.follow(bench.plan(A, B), running) is None


def test_a_step_lasts_from_the_end_of_the_one_in_front_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first takes from 0 to 5, and the second from there to 8, though it begins at 1."""
    bench = FollowingBench()
    now = 1e9
    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr("sglmoe.worker.worker.time", clock)
    first = bench.worker.begin(bench.plan(A, B))
    now += 1
    second = bench.follow(bench.plan(A, B), first)
    now += 4
    assert bench.worker.finish(first, is_followed=True).step_seconds == 5
    now += 3
    assert bench.worker.finish(second).step_seconds == 3


def test_memory_hears_of_steps_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step has used is told before the next one begins, for memory."""
    bench = FollowingBench()
    log = bench.model.log
    monkeypatch.setattr(bench.memory, "begin_step", lambda num_tokens: log.append("memory"))
    bench.steps(3)
    followed = "known, and followed"
    assert log == [
        *("memory", "begin", "begin", followed),
        *("memory", "begin", followed),
        *("memory", "known"),
    ]
