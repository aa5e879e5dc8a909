"""The planner in the loop: real memory, requests that route as they like, and a clock that is made up.

4 layers of 16 experts. A request uses 2 experts in each, which it prefers among few of its own. A
frame is an expert or 4 pages of 4 tokens; there are 64, and a request grows to 48 tokens, 3 frames. A
step computes for 10 ms and 0.5 ms for each request, and waits for each expert that it loads. One more
request comes every 8 steps until there are 18; these are served for ever.
"""

import random
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np

from sglmoe.memory.arena import Geometry
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.step_times import StepTimes
from sglmoe.memory.use_counter import UseCounter
from sglmoe.protocol import NewRequest, ResidencyPlan
from sglmoe.worker.request import WorkerRequest
from sglmoe.worker.residency_planner import PLAN_STEPS, ResidencyPlanner
from sglmoe.worker.step_watch import Price, StepKind, StepWatch

NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 16, 2
GEOMETRY = Geometry(
    num_frames=64,
    frame_bytes=200,
    expert_bytes=200,
    page_bytes=50,
    page_tokens=4,
    pages_per_frame=4,
    page_rows=24,
)
PROMPT_TOKENS, NEW_TOKENS = 16, 32
DEMAND = 18  # requests that are there at any time


class Run(NamedTuple):
    tokens_per_second: float
    plans: Sequence[ResidencyPlan]
    limits: Sequence[int | None]


class Machine:
    """Serves DEMAND requests at a time if it may."""

    def __init__(self, *, load_seconds: float, planned: bool) -> None:
        self.rng = random.Random(0)
        self.load_seconds = load_seconds
        self.memory = MemoryManager(
            GEOMETRY,
            num_layers=NUM_LAYERS,
            num_experts=NUM_EXPERTS,
            floor_frames=TOP_K,
            load_experts=lambda loads: None,
        )
        self.uses = UseCounter(NUM_LAYERS, NUM_EXPERTS)
        times = StepTimes()
        self.watch = StepWatch(times, Price(1, 1), num_experts=0)
        self.planner = ResidencyPlanner(
            times=times,
            uses=self.uses,
            geometry=GEOMETRY,
            floor_frames=TOP_K,
            max_running=32,
        )
        self.planned = planned
        self.plan = ResidencyPlan()
        self.running: list[WorkerRequest] = []
        self.num_admitted = 0
        self.seconds = 0.0

    def serve(self, num_steps: int) -> Run:
        num_tokens, plans = 0, []
        for number in range(num_steps):
            self.admit(most=1 + number // 8)
            before = self.plan
            num_tokens += self.step()
            if self.plan is not before:
                plans.append(self.plan)
                assert self.memory.violations() == []
            if number == num_steps // 2:  # what counts is where it comes to rest
                num_tokens, self.seconds = 0, 0.0
        return Run(num_tokens / self.seconds, plans, [plan.running_limit for plan in plans])

    def admit(self, *, most: int) -> None:
        limit = self.plan.running_limit if self.planned else None
        while len(self.running) < min(DEMAND, most, limit or DEMAND):
            request = new_request(self.num_admitted)
            self.num_admitted += 1
            self.memory.admit(request.rid, request.tokens.tobytes(), "")
            assert self.memory.extend(request.rid, PROMPT_TOKENS)
            request.tokens.append(1)  # its prefill takes no time here
            self.running.append(request)

    def step(self) -> int:
        """Decode once; how many tokens that gave."""
        before = self.memory.snapshot(0).expert_misses
        for layer in range(NUM_LAYERS):
            used = sorted({e for request in self.running for e in self.route(request, layer)})
            self.uses.note(layer, np.array(used, np.intp))
            for _ in self.memory.waves(layer, used):
                pass  # what a model would compute takes no time here
        snapshot = self.memory.snapshot(0)
        loading = (snapshot.expert_misses - before) * self.load_seconds
        step_seconds = 0.010 + 0.0005 * len(self.running) + loading
        snapshot = msgspec.structs.replace(
            snapshot, stall_seconds=snapshot.expert_misses * self.load_seconds
        )
        kind = StepKind(list(self.running), 0)
        cost = self.watch.step_done(kind, snapshot, step_seconds)
        self.plan = self.planner.step_done(kind, snapshot, cost)
        self.seconds += step_seconds
        for request in kind.decoding:
            self.advance(request)
        return kind.num_decoding

    def advance(self, request: WorkerRequest) -> None:
        request.tokens.append(1)
        if request.num_tokens_left:
            assert self.memory.extend(request.rid, len(request.tokens))
            return
        self.running.remove(request)
        self.memory.release(request.rid, request.tokens.tobytes(), PROMPT_TOKENS)

    def route(self, request: WorkerRequest, layer: int) -> list[int]:
        first = int(request.rid) * 5 + layer * 3
        near = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 5, 8]  # of the expert it likes most
        return [(first + self.rng.choice(near)) % NUM_EXPERTS for _ in range(TOP_K)]


def new_request(number: int) -> WorkerRequest:
    prompt = array("i", [1000 + number, *range(PROMPT_TOKENS - 1)])
    spec = NewRequest(
        rid=str(number),
        prompt_ids=prompt.tobytes(),
        output_ids=b"",
        sampling=b"",
        max_new_tokens=NEW_TOKENS,
        namespace="",
        logprobs=None,
        routed_experts_start=None,
        requires_reasoning=False,
    )
    return WorkerRequest(spec)


def serve(*, load_seconds: float, planned: bool) -> Run:
    return Machine(load_seconds=load_seconds, planned=planned).serve(10 * PLAN_STEPS)


def test_where_loads_cost_much_fewer_requests_run_and_more_tokens_come_out() -> None:
    """18 requests leave experts 10 to 20 frames, so that each of 60 used is loaded again and again."""
    unlimited = serve(load_seconds=0.002, planned=False)
    planned = serve(load_seconds=0.002, planned=True)
    assert all(limit in (5, 6, 7) for limit in planned.limits[3:])
    assert planned.tokens_per_second > 1.5 * unlimited.tokens_per_second


def test_what_is_predicted_at_rest_is_what_happens_next() -> None:
    plans = serve(load_seconds=0.002, planned=True).plans
    pairs = [(p, q) for p, q in pairwise(plans) if q.measured_running == p.num_running]
    assert len(pairs) > 3
    for plan, after in pairs:
        assert abs(plan.step_seconds / after.measured_step_seconds - 1) < 0.15


def test_where_loads_cost_little_all_run() -> None:
    planned = serve(load_seconds=0.0002, planned=True)
    assert set(planned.limits) == {None}
