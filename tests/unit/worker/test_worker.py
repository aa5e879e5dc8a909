"""The worker's part of a step, with a model that samples the number of tokens it has seen.

The arena has 8 frames of one expert or two pages of 4 tokens. Two frames are kept for experts, so
KV has 12 pages, 48 tokens.
"""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sglmoe.memory.arena import plan_geometry
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.step_times import StepTimes
from sglmoe.memory.store import ExpertReadError
from sglmoe.protocol import (
    LogprobSpec,
    MemorySnapshot,
    NewRequest,
    ResidencyPlan,
    Row,
    StepPlan,
    StepResult,
)
from sglmoe.worker.request import BatchRow
from sglmoe.worker.seams import Done, Pass, RowOutput
from sglmoe.worker.step_watch import Price, StepCost, StepKind, StepWatch
from sglmoe.worker.worker import Worker

PAGE_TOKENS = 4


class CountingModel:
    """Samples the request's length, so that tokens say what was computed; keeps the token table."""

    num_behind = 0

    def __init__(self) -> None:
        self.table: dict[tuple[int, int], int] = {}
        self.computed: list[tuple[str, int, int]] = []
        self.errors: dict[str, str] = {}
        self.disk_error = ""
        self.forgotten: list[str] = []

    def write_token_ids(self, table_row: int, start: int, token_ids: np.ndarray) -> None:
        for offset, token_id in enumerate(token_ids.tolist()):
            self.table[table_row, start + offset] = token_id

    def write_decode_ids(
        self, table_rows: Sequence[int], positions: Sequence[int], token_ids: Sequence[int]
    ) -> None:
        for row, position, token_id in zip(table_rows, positions, token_ids, strict=True):
            self.table[row, position] = token_id

    def begin(self, rows: Sequence[BatchRow]) -> Pass:
        if self.disk_error:
            raise ExpertReadError(self.disk_error)
        self.computed = [(row.request.rid, row.start, row.stop) for row in rows]
        outputs = [
            RowOutput(
                token_id=row.stop if row.samples else None,
                error=self.errors.get(row.request.rid, ""),
            )
            for row in rows
        ]
        return Done(outputs)

    def forget(self, rid: str) -> None:
        self.forgotten.append(rid)


class Bench:
    """A worker, its model and its memory; `step` checks every law each time."""

    def __init__(self, *, max_running: int = 4, planner: Any = None) -> None:
        geometry = plan_geometry(
            arena_bytes=8 * 1024,
            expert_bytes=1024,
            token_bytes=128,
            token_rows=4,
            page_tokens=PAGE_TOKENS,
        )
        self.memory = MemoryManager(
            geometry, num_layers=2, num_experts=4, floor_frames=2, load_experts=lambda loads: None
        )
        self.model = CountingModel()
        self.worker = Worker(
            memory=self.memory,
            model=self.model,
            max_running=max_running,
            watch=StepWatch(StepTimes(), Price(1, 1), num_experts=0),
            planner=planner,
        )
        self.num_steps = 0

    def add(self, rid: str, prompt: range, **fields: object) -> None:
        self.worker.add(new_request(rid, prompt, **fields))

    def step(self, *rows: tuple[str, int], **fields: tuple[str, ...]) -> StepResult:
        self.num_steps += 1
        plan = StepPlan(self.num_steps, tuple(Row(*row) for row in rows), **fields)
        result = self.worker.step(plan)
        assert self.memory.violations() == []
        return result


def new_request(rid: str, prompt: range, **fields: object) -> NewRequest:
    defaults = {
        "output_ids": b"",
        "sampling": b"",
        "max_new_tokens": 8,
        "namespace": "",
        "logprobs": None,
        "routed_experts_start": None,
        "requires_reasoning": False,
    }
    return NewRequest(rid=rid, prompt_ids=array("i", prompt).tobytes(), **(defaults | fields))  # type: ignore[arg-type]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def sampled(result: StepResult) -> dict[str, int | None]:
    return {row.rid: row.token_id for row in result.rows}


def test_a_prompt_is_prefilled_in_chunks_and_then_decoded(bench: Bench) -> None:
    bench.add("a", range(10))
    assert sampled(bench.step(("a", 6))) == {"a": None}
    assert sampled(bench.step(("a", 6))) == {"a": 10}
    assert bench.model.computed == [("a", 6, 10)]
    # The same row now means one decoded token, however many tokens it allows.
    assert sampled(bench.step(("a", 6))) == {"a": 11}
    assert bench.model.computed == [("a", 10, 11)]


def test_the_token_table_holds_the_ids_of_all_computed_positions(bench: Bench) -> None:
    bench.add("a", range(10))
    bench.step(("a", 10))
    bench.step(("a", 1))
    row = max(row for row, _ in bench.model.table)
    written = [bench.model.table[row, position] for position in range(11)]
    assert written == bench.memory.token_ids("a", 0, 11).tolist()


def test_a_prompt_seen_before_starts_behind_its_cached_pages(bench: Bench) -> None:
    bench.add("a", range(10))
    bench.step(("a", 10))
    bench.add("b", range(10))
    # b shares a's two full pages while a still runs.
    (row,) = bench.step(("b", 10)).rows
    assert (row.num_cached, row.num_computed) == (8, 10)
    assert bench.model.computed == [("b", 8, 10)]


def test_wanted_prompt_logprobs_are_computed_not_cached(bench: Bench) -> None:
    bench.add("a", range(10))
    bench.step(("a", 10))
    bench.add("b", range(10), logprobs=LogprobSpec(start=5, num_top=0, token_ids=None))
    bench.step(("b", 10))
    # Position 4 on would do, and pages are of 4 tokens.
    assert bench.model.computed == [("b", 4, 10)]


def test_namespaces_share_nothing(bench: Bench) -> None:
    bench.add("a", range(10), namespace="x")
    bench.step(("a", 10))
    bench.add("b", range(10), namespace="y")
    assert bench.step(("b", 10)).rows[0].num_cached == 0


def test_juniors_give_way_when_a_senior_needs_a_page(bench: Bench) -> None:
    # Three requests of 16 tokens fill the 12 pages of KV.
    for rid, start in (("a", 0), ("b", 100), ("c", 200)):
        bench.add(rid, range(start, start + 16))
        bench.step((rid, 16))
    # Each needs a fifth page for its first decoded token; c's memory goes to a and b.
    result = bench.step(("a", 1), ("b", 1), ("c", 1))
    assert sampled(result) == {"a": 17, "b": 17}
    assert result.rejected == ("c",)


def test_a_rejected_request_goes_on_where_it_was(bench: Bench) -> None:
    for rid, start in (("a", 0), ("b", 100), ("c", 200)):
        bench.add(rid, range(start, start + 16))
        bench.step((rid, 16))
    bench.step(("a", 1), ("b", 1), ("c", 1))
    # c has 17 tokens: its prompt and the one it sampled. The next is number 18.
    result = bench.step(("c", 100), drop=("a", "b"))
    assert sampled(result) == {"c": 17}
    assert bench.model.computed[0][2] == 17


def test_a_lone_request_that_does_not_fit_is_rejected_and_holds_nothing(bench: Bench) -> None:
    bench.add("a", range(49))  # 13 pages
    result = bench.step(("a", 49))
    assert (result.rows, result.rejected) == ((), ("a",))
    assert result.snapshot.locked_pages == 0


def test_more_requests_than_table_rows_wait() -> None:
    bench = Bench(max_running=1)
    bench.add("a", range(4))
    bench.add("b", range(100, 104))
    assert bench.step(("a", 4), ("b", 4)).rejected == ("b",)
    assert sampled(bench.step(("b", 4), drop=("a",))) == {"b": 4}


def test_dropping_frees_memory_and_keeps_the_prefix(bench: Bench) -> None:
    bench.add("a", range(16))
    bench.step(("a", 16))
    result = bench.step(drop=("a",))
    assert (result.snapshot.locked_pages, result.snapshot.cached_pages) == (0, 4)
    assert bench.model.forgotten == ["a"]


def test_probes_say_what_is_cached(bench: Bench) -> None:
    bench.add("a", range(16))
    bench.step(("a", 16))
    bench.add("b", range(16))
    assert bench.step(probe=("b", "gone")).cached_tokens == {"b": 12}


def test_a_failed_row_is_reported_and_others_go_on(bench: Bench) -> None:
    bench.add("a", range(4))
    bench.add("b", range(100, 104))
    bench.model.errors["a"] = "the grammar does not admit this"
    result = bench.step(("a", 4), ("b", 4))
    assert [(f.rid, f.status) for f in result.failed] == [("a", 400)]
    assert sampled(result) == {"b": 4}


def test_an_expert_that_can_not_be_read_fails_the_pass_and_not_the_worker(bench: Bench) -> None:
    bench.add("a", range(10))
    bench.step(("a", 8))
    bench.add("b", range(100, 104))
    bench.model.disk_error = "expert 3 of MoE layer 0 can't be read from a.safetensors"
    result = bench.step(("a", 2), ("b", 4))
    assert result.rows == ()
    assert [(f.rid, f.status) for f in result.failed] == [("a", 500), ("b", 500)]
    assert "a.safetensors" in result.failed[0].message
    # The scheduler drops both. Nothing of the pass is kept: what was computed before it is.
    bench.model.disk_error = ""
    bench.add("c", range(10))
    (row,) = bench.step(("c", 10), drop=("a", "b")).rows
    assert (row.num_cached, row.token_id) == (8, 10)


def test_a_new_worker_takes_up_a_request_with_its_output(bench: Bench) -> None:
    bench.add("a", range(10), output_ids=array("i", [10, 11]).tobytes())
    assert sampled(bench.step(("a", 100))) == {"a": 12}
    assert bench.model.computed == [("a", 0, 12)]


class Watcher:
    """In place of a planner: what it was told, and a plan with the number of steps for a limit."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[str], int]] = []

    def step_done(self, kind: StepKind, snapshot: MemorySnapshot, cost: StepCost) -> ResidencyPlan:
        assert cost.seconds > 0
        self.seen.append(([request.rid for request in kind.decoding], kind.num_prefill_tokens))
        return ResidencyPlan(running_limit=len(self.seen))


def test_the_planner_hears_what_each_step_did_and_its_plan_goes_out() -> None:
    watcher = Watcher()
    bench = Bench(planner=watcher)
    bench.add("a", range(10))
    bench.add("b", range(100, 104))
    limits = [
        bench.step(*rows).snapshot.plan.running_limit
        for rows in ([("a", 6)], [("a", 6)], [("a", 1), ("b", 4)], [("a", 1), ("b", 1)], [])
    ]
    assert watcher.seen == [([], 6), ([], 4), (["a"], 4), (["a", "b"], 0), ([], 0)]
    assert limits == [1, 2, 3, 4, 5]
