"""A plan every 64 decode steps. 16 frames of one expert or 2 pages of 4 tokens; 2 layers of 4 experts.

Steps are made up: those who decode, what memory says after it, and how long it took.
"""

from array import array

import msgspec
import numpy as np
import pytest

from sglmoe.memory.arena import Geometry
from sglmoe.memory.step_times import StepTimes
from sglmoe.memory.use_counter import UseCounter
from sglmoe.protocol import MemorySnapshot, NewRequest, ResidencyPlan
from sglmoe.worker.request import WorkerRequest
from sglmoe.worker.residency_planner import PLAN_STEPS, MissCorrection, ResidencyPlanner
from sglmoe.worker.step_watch import Price, StepKind, StepWatch

NOTHING = MemorySnapshot(*[0] * sum(f.required for f in msgspec.structs.fields(MemorySnapshot)))
GEOMETRY = Geometry(
    num_frames=16,
    frame_bytes=100,
    expert_bytes=90,
    page_bytes=50,
    page_tokens=4,
    pages_per_frame=2,
    page_rows=24,
)


def request(rid: str, *, num_tokens_left: int = 1000) -> WorkerRequest:
    spec = NewRequest(
        rid=rid,
        prompt_ids=array("i", range(10)).tobytes(),
        output_ids=b"",
        sampling=b"",
        max_new_tokens=num_tokens_left,
        namespace="",
        logprobs=None,
        routed_experts_start=None,
        requires_reasoning=False,
    )
    return WorkerRequest(spec)


class Server:
    """A planner and the steps it sees."""

    def __init__(self) -> None:
        self.times = StepTimes()
        self.watch = StepWatch(self.times, Price(1, 1), num_experts=0)
        self.uses = UseCounter(2, 4)
        self.planner = ResidencyPlanner(
            times=self.times,
            uses=self.uses,
            geometry=GEOMETRY,
            floor_frames=2,
            max_running=16,
        )
        self.snapshot = msgspec.structs.replace(NOTHING, num_frames=16)

    def step(
        self,
        kind: StepKind,
        *,
        used: tuple[int, ...] = (0, 1, 2, 3),
        misses: int = 0,
        locked_pages: int = 0,
        seconds: float = 0.01,
    ) -> ResidencyPlan:
        """Each miss takes 5 ms of the step."""
        for layer in range(2):
            self.uses.note(layer, np.array(used))
        self.snapshot = msgspec.structs.replace(
            self.snapshot,
            expert_misses=self.snapshot.expert_misses + misses,
            stall_seconds=self.snapshot.stall_seconds + 0.005 * misses,
            locked_pages=locked_pages,
        )
        cost = self.watch.step_done(kind, self.snapshot, seconds + 0.005 * misses)
        return self.planner.step_done(kind, self.snapshot, cost)

    def decode(self, num_requests: int, **step: int) -> ResidencyPlan:
        return self.step(StepKind([request(str(n)) for n in range(num_requests)], 0), **step)


def test_a_plan_is_made_after_so_many_decode_steps() -> None:
    server = Server()
    for _ in range(PLAN_STEPS - 1):
        assert server.decode(2) == ResidencyPlan()
        server.step(StepKind([], 100))
    plan = server.decode(2)
    assert (plan.measured_running, plan.measured_misses) == (2, 0)
    assert plan.measured_step_seconds == pytest.approx(0.01)
    assert server.decode(2) is plan


def test_a_server_whose_requests_crowd_out_experts_is_limited() -> None:
    """A request has 4 pages and is about to end: 6 of them leave 4 frames, 4 leave the 8 that the
    experts need."""
    server = Server()
    found = []
    for num_running, misses in ((6, 7), (5, 4), (4, 0), (4, 0)):
        kind = StepKind([request(str(n), num_tokens_left=0) for n in range(num_running)], 0)
        for _ in range(PLAN_STEPS):
            plan = server.step(kind, misses=misses, locked_pages=4 * num_running)
        found.append(plan.running_limit)
    assert found == [5, 4, 4, 4]
    assert (plan.expert_frames, plan.misses, plan.step_seconds) == pytest.approx((8, 0, 0.01))


def test_requests_grow_until_the_next_plan_and_no_further_than_they_may() -> None:
    server = Server()
    ending = StepKind([request(str(n), num_tokens_left=8) for n in range(2)], 0)
    for _ in range(PLAN_STEPS):
        plan = server.step(ending, misses=0, locked_pages=4)
    # 2 pages each and 2 more to come, 1 of them half-way: 2 requests take 3 frames of 16.
    assert plan.expert_frames == 13


def test_of_what_runs_is_predicted_what_was_measured() -> None:
    server = Server()
    for _ in range(PLAN_STEPS):
        # KV will have grown to all but 2 frames: all 8 experts are expected to miss. 3 do.
        plan = server.decode(6, misses=3, locked_pages=24)
    assert (plan.num_running, plan.expert_frames) == (6, 2)
    assert plan.misses == pytest.approx(3, rel=0.01)


def test_few_misses_correct_little() -> None:
    correction = MissCorrection()
    assert correction.factor == 1
    correction.note(3, 0)
    assert correction.factor == 4
    correction.note(0, 0)
    assert correction.factor == 2.5
    correction.note(10_000, 0)
    assert correction.factor == 8
