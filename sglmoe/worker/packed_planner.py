"""Plans every so often how much of the arena should hold packed experts, and which: memory does it.

What to plan is `memory/packed_share.py`'s to say; here are the measurements that it needs. Knows neither sockets nor
tensors.
"""

import logging
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sglmoe.memory.packed_order import Packing
from sglmoe.memory.packed_share import (
    FormCosts,
    PackedSnapshot,
    expected_residents,
    fix_packed_share,
    plan_packed_experts,
    plan_packed_share,
    plan_slab_class,
)
from sglmoe.memory.residency import MissCurve, StepModel
from sglmoe.memory.step_times import StepTimes
from sglmoe.memory.use_counter import UseCounter
from sglmoe.protocol import MemorySnapshot, PackedReport
from sglmoe.worker.step_watch import StepKind

logger = logging.getLogger(__name__)

# Arbitrary: decode steps from one plan to the next, as in `eval.packed_replay`.
PLAN_STEPS = 16


class Memory(Protocol):
    """The part of `MemoryManager` that does as planned."""

    @property
    def is_packed(self) -> npt.NDArray[np.bool_]: ...

    def pack(self, num_frames: int, experts: list[tuple[int, int]]) -> None: ...


class PackedPlanner:
    """Owns the plan. `step_done` is to be called after every step."""

    def __init__(
        self,
        memory: Memory,
        packing: Packing,
        *,
        times: StepTimes,
        uses: UseCounter,
        frame_bytes: int,
        floor_frames: int,
    ):
        self.report = PackedReport()
        self._memory = memory
        self._packing = packing
        self._times = times
        self._uses = uses
        self._slab = plan_slab_class(packing.expert_bytes, frame_bytes)
        self._floor_frames = floor_frames
        self._num_steps = 0  # that decoded, since the last plan
        self._is_paused = False

    def pause(self, is_paused: bool) -> None:
        """Plan nothing meanwhile."""
        self._is_paused = is_paused

    def step_done(self, kind: StepKind, snapshot: MemorySnapshot) -> PackedReport:
        """Learn from a step, with memory as it is after it; the plan that holds."""
        self._uses.end_step(kind.num_decoding)
        self._num_steps += kind.num_decoding > 0
        model = self._times.model
        if self._num_steps >= PLAN_STEPS and model is not None and not self._is_paused:
            self._num_steps = 0
            self._plan(self._snapshot(model, snapshot))
        return self.report

    def _snapshot(self, model: StepModel, memory: MemorySnapshot) -> PackedSnapshot:
        uses, ratio = self._uses.uses(), self._packing.decode_ratio()
        return PackedSnapshot(
            curve=MissCurve(uses),
            num_running=uses.num_running,
            num_frames=memory.num_frames - memory.kv_frames,
            floor_frames=self._floor_frames,
            slab=self._slab,
            costs=FormCosts(
                link_seconds=(1 - ratio) * model.load_seconds,
                decode_seconds=ratio * model.load_seconds,
            ),
            compute_seconds=model.compute_seconds(uses.num_running),
            packed_frames=memory.packed_frames,
        )

    def _plan(self, now: PackedSnapshot) -> None:
        share = self._packing.share
        plan = plan_packed_share(now) if share is None else fix_packed_share(now, share)
        num_ready, _ = expected_residents(now, plan.packed_frames)
        experts = plan_packed_experts(
            self._uses.uses().probability,
            self._memory.is_packed,
            num_ready=num_ready,
            limit=2 * plan.packed_frames,  # more than fit
        )
        self._memory.pack(plan.packed_frames, experts)
        if plan.packed_frames != self.report.target_frames:
            logger.info("packed experts: %d frames; %s", plan.packed_frames, plan.reason)
        self.report = PackedReport(
            target_frames=plan.packed_frames,
            decode_ratio=self._packing.decode_ratio(),
            stall_seconds=plan.stall_seconds,
            ready_only_seconds=plan.ready_only_seconds,
            reason=plan.reason,
        )
