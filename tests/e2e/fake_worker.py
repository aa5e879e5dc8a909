"""A worker that computes nothing: it answers plans with tokens that count up, and fails on demand.

So that the front end and the scheduler can be tried with real processes and real sockets, without
a model.
"""

import os
import signal
import time
from pathlib import Path

import numpy as np
import zmq

from sglmoe.protocol import (
    PROTOCOL_VERSION,
    AddRequests,
    CallDone,
    FlushCache,
    Limits,
    MemorySnapshot,
    NewRequest,
    Profile,
    RecordRouting,
    RequestReady,
    RoutedExperts,
    RowResult,
    ShowMemory,
    Shutdown,
    StepPlan,
    StepResult,
    TokenLogprobs,
    ToWorker,
    WorkerProgress,
    WorkerReady,
)
from sglmoe.step_mark import StepMark
from sglmoe.transport import Receiver, Sender, plans_address, results_address

LIMITS = Limits(
    total_tokens=2000, page_tokens=4, max_running=16, context_tokens=4096, vocab_size=1024
)
STEP_SECONDS = 0.005
FIRST_TOKEN = 300
KILL_TOKEN = 999  # a prompt with this one kills the worker
DEAFEN_TOKEN = 998  # with this one, it makes its first worker close its sockets and live on
BAD_GRAMMAR = b"(unclosed"
LEAVES = "The fake worker leaves, as it was told to"
NUM_LAYERS, TOP_K = 2, 3


class Running:
    def __init__(self, spec: NewRequest) -> None:
        self.spec = spec
        self.prompt = np.frombuffer(spec.prompt_ids, dtype=np.int32)
        self.num_outputs = len(spec.output_ids) // 4
        self.num_computed = 0

    @property
    def deafens(self) -> bool:
        return DEAFEN_TOKEN in self.prompt and self.num_outputs == 3 and not self.spec.output_ids

    def advance(self, num_tokens: int) -> RowResult:
        total = len(self.prompt) + self.num_outputs
        start = self.num_computed
        self.num_computed = min(start + num_tokens, total)
        prompt_logprobs = self._prompt_logprobs(start, min(self.num_computed, len(self.prompt)))
        token_id, logprobs = None, None
        if self.num_computed == total:
            token_id = FIRST_TOKEN + self.num_outputs % 100
            self.num_outputs += 1
            logprobs = self._logprobs(token_id) if self.spec.logprobs else None
        num_new = self.num_computed - start
        routing = None
        if self.spec.routed_experts_start is not None:
            ids = np.arange(start, self.num_computed, dtype=np.int32).repeat(NUM_LAYERS * TOP_K)
            routing = RoutedExperts(shape=(num_new, NUM_LAYERS, TOP_K), ids=ids.tobytes())
        return RowResult(
            rid=self.spec.rid,
            num_computed=self.num_computed,
            num_cached=0,
            token_id=token_id,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            routed_experts=routing,
        )

    def _prompt_logprobs(self, start: int, stop: int) -> tuple[TokenLogprobs, ...]:
        if self.spec.logprobs is None:
            return ()
        first = max(start, self.spec.logprobs.start)
        return tuple(self._logprobs(int(self.prompt[i])) for i in range(first, stop))

    def _logprobs(self, token_id: int) -> TokenLogprobs:
        spec = self.spec.logprobs
        assert spec is not None
        top = range(spec.num_top)
        return TokenLogprobs(
            token_id=token_id,
            logprob=-token_id / 1000,
            top_logprobs=tuple(-0.1 * (1 + rank) for rank in top),
            top_ids=tuple(400 + rank for rank in top),
            picked_logprobs=tuple(-2.0 for _ in spec.token_ids or ()),
        )


class FakeWorker:
    def __init__(self, sender: Sender, plans: Receiver, step_mark: StepMark) -> None:  # type: ignore[type-arg]
        self._sender = sender
        self._step_mark = step_mark
        self._plans = plans
        self._requests: dict[str, Running] = {}

    def run(self) -> None:
        while True:
            match self._plans.receive():
                case Shutdown():
                    print(LEAVES, flush=True)
                    return
                case AddRequests(requests):
                    self._add(requests)
                case StepPlan() as plan:
                    self._step_mark.step_id = plan.step_id
                    self._sender.send(self._step(plan))
                case (
                    FlushCache(call_id)
                    | Profile(call_id)
                    | RecordRouting(call_id)
                    | ShowMemory(call_id)
                ):
                    self._sender.send(CallDone(call_id, success=True))

    def _add(self, requests: tuple[NewRequest, ...]) -> None:
        for spec in requests:
            self._requests[spec.rid] = Running(spec)
            if BAD_GRAMMAR in spec.sampling:
                self._sender.send(RequestReady(spec.rid, error="Failed to compile regex grammar"))

    def _step(self, plan: StepPlan) -> StepResult:
        for rid in plan.drop:
            self._requests.pop(rid)
        for rid in plan.preempt:
            self._requests[rid].num_computed = 0
        if plan.rows:
            time.sleep(STEP_SECONDS)
        for row in plan.rows:
            if KILL_TOKEN in self._requests[row.rid].prompt:
                os.kill(os.getpid(), signal.SIGKILL)
            if self._requests[row.rid].deafens:
                self._sender.close()
                self._plans.close()
                time.sleep(3600)
        rows = tuple(self._requests[row.rid].advance(row.num_tokens) for row in plan.rows)
        return StepResult(
            step_id=plan.step_id,
            rows=rows,
            rejected=(),
            failed=(),
            cached_tokens=dict.fromkeys(plan.probe, 0),
            snapshot=self.snapshot(plan.step_id),
            step_seconds=STEP_SECONDS,
        )

    def snapshot(self, step_id: int) -> MemorySnapshot:
        locked = sum(-(-r.num_computed // LIMITS.page_tokens) for r in self._requests.values())
        return MemorySnapshot(
            step_id=step_id,
            num_frames=100,
            frame_bytes=1 << 20,
            free_frames=40,
            expert_frames=50,
            kv_frames=10,
            total_pages=LIMITS.total_tokens // LIMITS.page_tokens,
            locked_pages=locked,
            cached_pages=0,
            free_pages=0,
            page_tokens=LIMITS.page_tokens,
            expert_hits=10 * step_id,
            expert_misses=step_id,
            expert_bytes_moved=step_id << 20,
            stall_seconds=0.001 * step_id,
            num_waves=step_id,
            num_split_layers=0,
            experts_evicted=step_id,
            pages_evicted=0,
            cache_hit_tokens=0,
            prefill_tokens=0,
            ghost_hit_tokens=0,
        )


def run_fake_worker(
    server_args: object,
    config: object,
    gpu_id: int,
    nccl_port: int,
    socket_directory: str,
    step_mark: StepMark,
) -> None:
    context: zmq.Context = zmq.Context()  # type: ignore[type-arg]
    directory = Path(socket_directory)
    sender: Sender = Sender(context, results_address(directory), bind=False)  # type: ignore[type-arg]
    plans: Receiver = Receiver(context, plans_address(directory), ToWorker, bind=False)  # type: ignore[type-arg]
    worker = FakeWorker(sender, plans, step_mark)
    sender.send(WorkerProgress("pretending to load", 1, 1))
    sender.send(WorkerReady(PROTOCOL_VERSION, LIMITS, worker.snapshot(0), 0.5, "a fake worker"))
    worker.run()
