"""What packed experts are worth. Frames of 100 bytes, a packed expert of 70; one layer of 6, worth 1, 2, 4, 8, 16, 32."""

import math

import numpy as np
import pytest

from sglmoe.memory.arena import Frames
from sglmoe.memory.eviction import Clock
from sglmoe.memory.expert_values import UseCount
from sglmoe.memory.packed_order import FrameValues, PackedFrame, PackedOrder, Packing
from sglmoe.memory.packed_slabs import PackedSlabs

SHAPE = 1, 6
WORTH = 2.0 ** np.arange(6)[np.newaxis]


class Bench:
    """Of 8 frames 3 hold the first four experts packed, cells 0 to 3: places have 0 1, 1 2, and 2 3."""

    def __init__(self, *, ratio: float = 0.25, share: float | None = None):
        self.ratio = ratio
        self.frames, self.clock = Frames(8), Clock()
        self.slabs = PackedSlabs(self.frames, SHAPE, frame_bytes=100, cell_bytes=70)
        for _ in range(3):
            self.slabs.grow()
        self.slabs.hold([(0, expert) for expert in range(4)])
        self.values = UseCount(SHAPE)
        self.values.now()[:] = WORTH
        packing = Packing(70, lambda: self.ratio, share)
        self.order = PackedOrder(
            self.slabs, self.values, packing, frames=self.frames, clock=self.clock
        )

    def give_back(self) -> int:
        frame = self.order.first()
        assert frame is not None
        self.slabs.give_back(frame.place)
        return frame.place


def test_the_frame_goes_with_which_the_least_is_lost() -> None:
    """Loads of two experts, less their decoding."""
    bench = Bench()
    assert bench.order.first() == PackedFrame(0, 0.75 * (1 + 2))
    assert [bench.give_back() for _ in range(3)] == [0, 1, 2]
    assert bench.order.first() is None


def test_the_slower_decoding_the_less_is_lost() -> None:
    assert Bench(ratio=1.0).order.first() == PackedFrame(0, 0)


def test_values_are_looked_at_again_when_something_was_used_or_is_to_be_held() -> None:
    bench = Bench()
    assert bench.order.first() == PackedFrame(0, 2.25)
    bench.values.now()[0, 0] = 100
    assert bench.order.first() == PackedFrame(0, 2.25)
    bench.clock.tick()
    assert bench.order.first() == PackedFrame(1, 0.75 * (2 + 4))
    bench.slabs.hold([(0, 0), (0, 3)])  # cells 0 and 3
    assert bench.order.first() == PackedFrame(1, 0)


def test_what_loads_use_is_passed_over_until_they_are_over() -> None:
    bench = Bench()
    bench.slabs.begin(0, 0)
    assert bench.order.first() == PackedFrame(1, 0.75 * (2 + 4))
    bench.slabs.begin(0, 2)
    assert bench.order.first() is None
    bench.slabs.end(0, 0, is_there=True)
    bench.slabs.end(0, 2, is_there=True)
    assert bench.order.first() == PackedFrame(0, 2.25)


def test_a_share_is_kept_whatever_it_is_worth() -> None:
    """3 of 8 frames are a half or less while KV has 2 or fewer; with 3 it is one too many."""
    bench = Bench(share=0.5)
    values = []
    for _ in range(4):
        frame = bench.order.first()
        assert frame is not None
        values.append(frame)
        bench.frames.take_for_kv()
    assert values == [PackedFrame(0, math.inf)] * 3 + [PackedFrame(0, -math.inf)]


@pytest.mark.parametrize(("ratio", "first"), [(0.25, 0.25), (1.0, 1.0)])
def test_a_frame_whose_expert_is_packed_too_saves_its_decoding_alone(
    ratio: float, first: float
) -> None:
    is_packed = np.array([[True, False, True, False, False, False]])
    values = UseCount(SHAPE)
    values.now()[:] = WORTH
    frames = FrameValues(values, is_packed, lambda: ratio)
    assert frames.now().tolist() == [[first, 2, 4 * first, 8, 16, 32]]
    assert frames.demand().tolist() == WORTH.tolist(), "what host memory follows is left alone"
    frames.use(0, np.array([0]))
    assert values.now()[0, 0] == 2
