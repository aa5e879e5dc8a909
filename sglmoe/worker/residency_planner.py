"""Watches the worker's steps, and plans every so often how many requests should run at once.

What to plan is `memory/residency.py`'s to say; here are the measurements that it needs. Knows
neither sockets nor tensors.
"""

from collections.abc import Sequence

import msgspec

from sglmoe.memory.arena import Geometry
from sglmoe.memory.residency import (
    MissCurve,
    ResidencySnapshot,
    expert_frames,
    plan_residency,
)
from sglmoe.memory.step_times import StepTimes
from sglmoe.memory.use_counter import UseCounter
from sglmoe.protocol import MemorySnapshot, ResidencyPlan
from sglmoe.worker.request import WorkerRequest
from sglmoe.worker.step_watch import StepCost, StepKind

# Arbitrary: decode steps from one plan to the next.
PLAN_STEPS = 64
# Arbitrary: misses are believed to differ from the miss curve by no more than this factor.
MAX_CORRECTION = 8.0


class Totals(msgspec.Struct, frozen=True):
    """Sums over the decode steps since a plan."""

    num_steps: int = 0
    num_rows: int = 0
    misses: int = 0
    seconds: float = 0.0


class MissCorrection:
    """Misses measured over misses predicted, the last plan's half as heavy as this one's."""

    def __init__(self) -> None:
        self._measured = self._predicted = 1.0  # one miss each, so that few don't say much

    def note(self, measured: float, predicted: float) -> None:
        self._measured = 0.5 * (self._measured + 1) + measured
        self._predicted = 0.5 * (self._predicted + 1) + predicted

    @property
    def factor(self) -> float:
        factor = self._measured / self._predicted
        return min(max(factor, 1 / MAX_CORRECTION), MAX_CORRECTION)


class ResidencyPlanner:
    """Owns the plan. `step_done` is to be called after every step."""

    def __init__(
        self,
        *,
        times: StepTimes,
        uses: UseCounter,
        geometry: Geometry,
        floor_frames: int,
        max_running: int,
    ):
        self.plan = ResidencyPlan()
        self._times = times
        self._uses = uses
        self._geometry = geometry
        self._floor_frames = floor_frames
        self._max_running = max_running
        self._correction = MissCorrection()
        self._totals = Totals()

    def step_done(self, kind: StepKind, snapshot: MemorySnapshot, cost: StepCost) -> ResidencyPlan:
        """Learn from a step, with memory as it is after it; the plan that holds."""
        self._uses.end_step(kind.num_decoding)
        if kind.num_decoding:
            self._count(kind, cost)
        if self._totals.num_steps == PLAN_STEPS:
            self._make_plan(kind.decoding, snapshot)
        return self.plan

    def _count(self, kind: StepKind, cost: StepCost) -> None:
        totals = self._totals
        self._totals = Totals(
            num_steps=totals.num_steps + 1,
            num_rows=totals.num_rows + kind.num_decoding,
            misses=totals.misses + cost.misses,
            seconds=totals.seconds + cost.seconds,
        )

    def _make_plan(self, decoding: Sequence[WorkerRequest], snapshot: MemorySnapshot) -> None:
        totals, self._totals = self._totals, Totals()
        mean_rows = totals.num_rows / PLAN_STEPS
        now = ResidencySnapshot(
            num_frames=snapshot.num_frames,
            floor_frames=self._floor_frames,
            pages_per_frame=self._geometry.pages_per_frame,
            pages_per_request=self._pages_per_request(decoding, snapshot),
            num_running=len(decoding),
            max_running=self._max_running,
            curve=MissCurve(self._uses.uses()),
            model=self._times.model,
            limit=self.plan.running_limit,
        )
        predicted = now.curve.misses(mean_rows, expert_frames(now, mean_rows))
        self._correction.note(totals.misses, PLAN_STEPS * predicted)
        plan = plan_residency(msgspec.structs.replace(now, miss_correction=self._correction.factor))
        self.plan = msgspec.structs.replace(
            plan,
            measured_running=mean_rows,
            measured_misses=totals.misses / PLAN_STEPS,
            measured_step_seconds=totals.seconds / PLAN_STEPS,
        )

    def _pages_per_request(
        self, decoding: Sequence[WorkerRequest], snapshot: MemorySnapshot
    ) -> float:
        """Mean pages of those that run, half-way to the next plan: each grows by a token a step."""
        growth_tokens = sum(min(request.num_tokens_left, PLAN_STEPS) for request in decoding)
        growth_pages = growth_tokens / 2 / self._geometry.page_tokens
        return (snapshot.locked_pages + growth_pages) / len(decoding)
