"""When frames are given to packed experts, and to whom: 2 layers of 4 experts, 8 frames of 100 bytes, packed ones of 66.

A step computes for 1 ms and uses experts 0 and 1 of each layer always, 2 in every second step, 3 in every fourth. 2 frames
are KV. Each expert that is loaded takes 10 ms.
"""

import msgspec
import numpy as np
import pytest
from test_step_watch import NOTHING, request

from sglmoe.memory.packed_order import Packing
from sglmoe.memory.step_times import StepTimes
from sglmoe.memory.use_counter import UseCounter
from sglmoe.protocol import PackedReport
from sglmoe.worker.packed_planner import PLAN_STEPS, PackedPlanner
from sglmoe.worker.step_watch import StepKind

DECODE, PREFILL = StepKind([request("a"), request("b")], 0), StepKind([], 100)


class Memory:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.is_packed = np.zeros((2, 4), np.bool_)
        self.packs: list[tuple[int, list[tuple[int, int]]]] = []

    def pack(self, num_frames: int, experts: list[tuple[int, int]]) -> None:
        self.packs.append((num_frames, experts))


class Server:
    def __init__(self, *, share: float | None = None, ratio: float = 0.05) -> None:
        self.memory = Memory()
        self.times = StepTimes()
        self.uses = UseCounter(2, 4)
        self.num_steps = 0
        self.planner = PackedPlanner(
            self.memory,
            Packing(66, lambda: ratio, share),
            times=self.times,
            uses=self.uses,
            frame_bytes=100,
            floor_frames=1,
        )
        self.snapshot = msgspec.structs.replace(NOTHING, num_frames=8, kv_frames=2)

    def step(self, kind: StepKind = DECODE) -> PackedReport:
        used = [
            0,
            1,
            *([2] if self.num_steps % 2 == 0 else []),
            *([3] if not self.num_steps % 4 else []),
        ]
        for layer in range(2):
            self.uses.note(layer, np.array(used))
        self.num_steps += 1
        if kind is DECODE:
            self.times.note_loads(1, waited_seconds=0.010, link_seconds=0.010)
            self.times.note_decode(1, 0.001)
        return self.planner.step_done(kind, self.snapshot)

    def run(self, num_steps: int = PLAN_STEPS) -> PackedReport:
        for _ in range(num_steps):
            report = self.step()
        return report


def test_a_plan_is_made_after_so_many_decode_steps() -> None:
    server = Server()
    for _ in range(PLAN_STEPS - 1):
        assert server.step() == PackedReport()
        server.step(PREFILL)
    assert server.memory.packs == []
    report = server.step()
    assert len(server.memory.packs) == 1
    assert server.step() is report
    server.run(PLAN_STEPS - 1)
    assert len(server.memory.packs) == 2


def test_where_decoding_is_quick_frames_of_those_used_less_hold_packed_ones() -> None:
    """One frame is what others pass through. 5 ready of 8 leave 1.0 to load in a step; 3 ready and 3 packed in two frames
    leave 0.5, for 2.0 to decode."""
    server = Server()
    report = server.run()
    ((num_frames, experts),) = server.memory.packs
    assert report.target_frames == num_frames == 2
    assert report.ready_only_seconds == pytest.approx(0.010, rel=0.1)
    assert report.stall_seconds == pytest.approx(0.006, rel=0.1)
    assert report.decode_ratio == 0.05
    assert "2 packed frames promise a stall of " in report.reason
    assert experts == [(1, 1), (0, 2), (1, 2), (0, 3)], (
        "all but the three most used; one more than fits"
    )


@pytest.mark.parametrize("ratio", [0.8, 1.0])
def test_where_decoding_takes_as_long_as_loading_nothing_is_packed(ratio: float) -> None:
    server = Server(ratio=ratio)
    report = server.run()
    assert server.memory.packs == [(0, [])]
    assert report.target_frames == 0
    assert report.stall_seconds == report.ready_only_seconds > 0


def test_a_load_takes_as_long_whatever_part_of_it_is_decoding() -> None:
    quick, slow = Server(ratio=0.05).run(), Server(ratio=0.8).run()
    assert quick.ready_only_seconds == pytest.approx(slow.ready_only_seconds)


def test_a_share_is_held_whatever_it_promises() -> None:
    server = Server(share=0.75, ratio=1.0)
    report = server.run()
    assert server.memory.packs[0][0] == report.target_frames == 4, "of the 6 that KV leaves"
    assert report.reason == "75% was asked for"
    server.snapshot = msgspec.structs.replace(server.snapshot, kv_frames=0)
    assert server.run().target_frames == 6
    server.snapshot = msgspec.structs.replace(server.snapshot, kv_frames=7)
    assert server.run().target_frames == 0, "the floor"


def test_while_a_trace_is_recorded_nothing_is_planned() -> None:
    server = Server()
    server.planner.pause(True)
    server.run(3 * PLAN_STEPS)
    assert server.memory.packs == []
    server.planner.pause(False)
    server.step()
    assert len(server.memory.packs) == 1
