"""The worker's part of a step: find memory for the rows of a plan, run the model, account for what was computed.

Owns the requests the scheduler has named and the rows of the token table. Memory truth is the `MemoryManager`'s, tensors and
sampling are the `Model`'s. Knows neither sockets nor sglang.
"""

import logging
import time
from array import array
from collections.abc import Sequence

import msgspec

from sglmoe.memory.store import ExpertReadError
from sglmoe.protocol import (
    MemorySnapshot,
    NewRequest,
    Row,
    RowFailure,
    RowResult,
    StepPlan,
    StepResult,
)
from sglmoe.worker.packed_planner import PackedPlanner
from sglmoe.worker.prefetching import Prefetching
from sglmoe.worker.request import BatchRow, WorkerRequest
from sglmoe.worker.residency_planner import ResidencyPlanner
from sglmoe.worker.seams import Memory, Model, Pass, RowOutput
from sglmoe.worker.step_watch import StepKind, StepWatch

logger = logging.getLogger(__name__)

# Among the tokens of a request: one that is being sampled while the step behind it has begun.
TO_COME = -1


class RunningStep(msgspec.Struct, frozen=True, eq=False):
    """A step that has begun."""

    plan: StepPlan
    started: float  # by time.perf_counter
    rows: Sequence[BatchRow]
    kind: StepKind
    running: Pass | None  # None: there is nothing to compute, or that has failed
    rejected: tuple[str, ...] = ()
    failed: tuple[RowFailure, ...] = ()

    @property
    def is_over(self) -> bool:
        """Whether it can be finished without waiting."""
        return self.running is None or self.running.is_over

    @property
    def may_be_followed(self) -> bool:
        """Whether it is worth while to wait for the next plan before it is finished."""
        return self.running is not None and self.running.may_be_followed


class Worker:
    """Executes `StepPlan`s, one after the other: a step begins, and is finished before another one begins, but for one that
    follows it (`follow`)."""

    def __init__(
        self,
        *,
        memory: Memory,
        model: Model,
        max_running: int,
        watch: StepWatch | None = None,
        planner: ResidencyPlanner | None = None,
        prefetching: Prefetching | None = None,
        packed: PackedPlanner | None = None,
    ):
        self.memory = memory  # replaced while a routing trace is recorded
        self._model = model
        self._watch = watch
        self._planner = planner
        self._prefetching = prefetching
        self._packed = packed
        self._requests: dict[str, WorkerRequest] = {}
        self._ended = 0.0  # when the last step was finished, by time.perf_counter
        # Row 0 is where sglang's padded batches point to.
        self._free_table_rows = list(range(max_running, 0, -1))

    @property
    def is_idle(self) -> bool:
        """Whether no request holds memory."""
        return not any(request.holds_memory for request in self._requests.values())

    def add(self, spec: NewRequest) -> WorkerRequest:
        request = WorkerRequest(spec)
        self._requests[spec.rid] = request
        return request

    def step(self, plan: StepPlan) -> StepResult:
        """All of it."""
        return self.finish(self.begin(plan))

    def begin(self, plan: StepPlan) -> RunningStep:
        """Drop, preempt, then advance the rows that memory can be found for. No other step runs."""
        started = time.perf_counter()
        for rid in plan.drop:
            self._drop(rid)
        for rid in plan.preempt:
            self._give_back(self._requests[rid])
        rows, rejected = self._reserve(plan.rows)
        kind = StepKind.of(rows)
        running, failed = self._begin_pass(rows)
        return RunningStep(plan, started, rows, kind, running, rejected, failed)

    def follow(self, plan: StepPlan, step: RunningStep) -> RunningStep | None:
        """Begin the plan's step behind the one that runs, which has not said what it has sampled. None, and nothing is done,
        where the plan is not just the next token of the same requests, or these need more memory than is at hand."""
        if not self._may_follow(plan, step):
            return None
        assert step.running is not None
        started = time.perf_counter()
        rows = [self._next_row(row) for row in step.rows]
        self._write_decode_ids(rows)
        running = self._model.follow(rows, step.running)
        return RunningStep(plan, started, rows, StepKind.of(rows), running)

    def finish(self, step: RunningStep, *, is_followed: bool = False) -> StepResult:
        """Wait for what it has sampled, and account for it. `is_followed`: another one has begun behind it."""
        results, failed = self._results(step, is_followed)
        snapshot = self.memory.snapshot(step.plan.step_id)
        ended = time.perf_counter()
        seconds, self._ended = ended - max(step.started, self._ended), ended
        snapshot = self._learn(step.kind, snapshot, seconds)
        if is_followed:  # whose uses memory is told next
            self.memory.begin_step(len(step.rows))
        probed = (rid for rid in step.plan.probe if rid in self._requests)
        return StepResult(
            step_id=step.plan.step_id,
            rows=results,
            rejected=step.rejected,
            failed=failed,
            cached_tokens={rid: self._probe(rid) for rid in probed},
            snapshot=snapshot,
            step_seconds=seconds,
        )

    def flush_cache(self) -> None:
        self.memory.flush_cache()

    def _learn(self, kind: StepKind, snapshot: MemorySnapshot, seconds: float) -> MemorySnapshot:
        """What a step has cost makes prices and plans; the snapshot with the plan that holds."""
        if self._watch is None:
            return snapshot
        cost = self._watch.step_done(kind, snapshot, seconds)
        if price := self._watch.new_price():
            self.memory.set_prices(**price._asdict())
        snapshot = msgspec.structs.replace(snapshot, costs=self._watch.costs(snapshot))
        if self._prefetching is not None:
            report = self._prefetching.step_done(kind, snapshot, cost)
            snapshot = msgspec.structs.replace(snapshot, prefetch=report)
        if self._packed is not None:
            packed = self._packed.step_done(kind, snapshot)
            snapshot = msgspec.structs.replace(snapshot, packed=packed)
        if self._planner is not None:
            plan = self._planner.step_done(kind, snapshot, cost)
            snapshot = msgspec.structs.replace(snapshot, plan=plan)
        return snapshot

    # ------------------------------------------------------------------------------------------------ memory of rows

    def _reserve(self, rows: Sequence[Row]) -> tuple[list[BatchRow], tuple[str, ...]]:
        """Find pages for each row, seniors first; juniors of the same plan give way to them."""
        waiting = [self._requests[row.rid] for row in rows]
        reserved: list[BatchRow] = []
        rejected: list[str] = []
        for index, row in enumerate(rows):
            request = waiting[index]
            if request.rid in rejected:
                continue
            juniors = [r for r in waiting[index + 1 :] if r.holds_memory]
            batch_row = self._reserve_row(request, row.num_tokens)
            while batch_row is None and juniors:
                junior = juniors.pop()
                self._give_back(junior)
                rejected.append(junior.rid)
                batch_row = self._reserve_row(request, row.num_tokens)
            if batch_row is None:
                self._give_back(request)
                rejected.append(request.rid)
            else:
                reserved.append(batch_row)
        self._write_decode_ids([row for row in reserved if row.decodes])
        self._extend_ahead(reserved)
        return reserved, tuple(rejected)

    def _extend_ahead(self, rows: Sequence[BatchRow]) -> None:
        """Have pages at hand for steps that are likely to follow, as far as there are any and requests may need them."""
        if not all(row.decodes for row in rows):
            return
        for row in rows:
            num_ahead = min(self._model.num_behind, row.request.num_tokens_left - 1)
            if not self.memory.extend(row.request.rid, row.stop + max(0, num_ahead)):
                return

    def _reserve_row(self, request: WorkerRequest, num_tokens: int) -> BatchRow | None:
        if not request.holds_memory and not self._admit(request):
            return None
        start = request.num_computed
        stop = min(start + max(num_tokens, 1), len(request.tokens))
        if not self.memory.extend(request.rid, stop):
            return None
        row = BatchRow.of(request, start, stop)
        if not row.decodes:
            ids = self.memory.token_ids(request.rid, start, stop)
            self._model.write_token_ids(request.table_row, start, ids)
        return row

    def _admit(self, request: WorkerRequest) -> bool:
        if not self._free_table_rows:
            return False
        request.table_row = self._free_table_rows.pop()
        num_cached = self.memory.admit(
            request.rid,
            request.tokens.tobytes(),
            request.spec.namespace,
            max_cached_tokens=request.max_cached,
        )
        request.num_cached = request.num_computed = num_cached
        if num_cached:
            ids = self.memory.token_ids(request.rid, 0, num_cached)
            self._model.write_token_ids(request.table_row, 0, ids)
        return True

    def _write_decode_ids(self, rows: Sequence[BatchRow]) -> None:
        if not rows:
            return
        self._model.write_decode_ids(
            [row.request.table_row for row in rows],
            [row.start for row in rows],
            [self.memory.token_id(row.request.rid, row.start) for row in rows],
        )

    def _give_back(self, request: WorkerRequest) -> None:
        """Keep what is computed as a cached prefix and hold no memory."""
        if not request.holds_memory:
            return
        tokens = request.token_bytes(request.num_computed)
        self.memory.release(request.rid, tokens, request.num_computed)
        self._free_table_rows.append(request.table_row)
        request.table_row = -1
        request.num_computed = 0

    def _drop(self, rid: str) -> None:
        request = self._requests.pop(rid, None)
        if request is not None:
            self._give_back(request)
            self._model.forget(rid)

    def _probe(self, rid: str) -> int:
        request = self._requests[rid]
        if request.holds_memory:
            return request.num_computed
        return self.memory.probe(request.token_bytes(request.max_cached), request.spec.namespace)

    # ------------------------------------------------------------------------------------------------ running rows

    def _begin_pass(self, rows: Sequence[BatchRow]) -> tuple[Pass | None, tuple[RowFailure, ...]]:
        if not rows:
            return None, ()
        self.memory.begin_step(sum(row.stop - row.start for row in rows))
        try:
            return self._model.begin(rows), ()
        except ExpertReadError as error:
            # They share the pass. Nothing of it counts, and what is unharmed can be served on.
            logger.error("%d requests fail: %s", len(rows), error)
            return None, tuple(RowFailure(row.request.rid, 500, str(error)) for row in rows)

    def _may_follow(self, plan: StepPlan, step: RunningStep) -> bool:
        if not step.may_be_followed or self._packed is not None:
            return False
        if plan.drop or plan.preempt or plan.probe:
            return False
        if [row.rid for row in plan.rows] != [row.request.rid for row in step.rows]:
            return False
        return self.memory.has_pages((row.request.rid, row.stop + 1) for row in step.rows)

    def _next_row(self, row: BatchRow) -> BatchRow:
        """The row that computes what this one is going to sample, whose place among the request's tokens is taken already."""
        request = row.request
        request.tokens.append(TO_COME)
        is_extended = self.memory.extend(request.rid, row.stop + 1)
        assert is_extended, f"{request.rid} has no page at hand"
        return BatchRow.of(request, row.stop, row.stop + 1)

    def _results(
        self, step: RunningStep, is_followed: bool
    ) -> tuple[tuple[RowResult, ...], tuple[RowFailure, ...]]:
        if step.running is None:
            return (), step.failed
        results: list[RowResult] = []
        failed: list[RowFailure] = []
        outputs = step.running.outputs(is_followed=is_followed)
        for row, output in zip(step.rows, outputs, strict=True):
            if output.error:
                failed.append(RowFailure(rid=row.request.rid, status=400, message=output.error))
            else:
                results.append(self._account(row, output))
        return tuple(results), tuple(failed)

    def _account(self, row: BatchRow, output: RowOutput) -> RowResult:
        request = row.request
        request.num_computed = row.stop
        if not row.decodes:
            self._share(request)
        request.next_logprob = max(request.next_logprob, row.stop)
        if request.next_routed is not None:
            request.next_routed = max(request.next_routed, row.stop)
        if output.token_id is not None:
            request.tokens[row.stop : row.stop + 1] = array("i", [output.token_id])
        return RowResult(
            rid=request.rid,
            num_computed=row.stop,
            num_cached=request.num_cached,
            token_id=output.token_id,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            routed_experts=output.routed_experts,
            grammar_done=output.grammar_done,
        )

    def _share(self, request: WorkerRequest) -> None:
        """Make a prefilled prefix visible to others; where another was first, use its pages instead of ours."""
        tokens = request.token_bytes(request.num_computed)
        if self.memory.commit(request.rid, tokens, request.num_computed):
            ids = self.memory.token_ids(request.rid, 0, request.num_computed)
            self._model.write_token_ids(request.table_row, 0, ids)
