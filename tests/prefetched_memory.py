"""A memory manager of 8 frames, or some other number, 2 layers or more of 4 experts. What arrives when, the test says."""

import time
from collections.abc import Sequence

import numpy as np

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Geometry
from sglmoe.memory.experts import Load
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.prefetch import Arrival, Wanted


class Background:
    """Loads arrive when told to."""

    def __init__(self) -> None:
        self.under_way: list[Load] = []
        self.promoted: list[Load] = []
        self.ended: list[Arrival] = []
        self.log: list[str] = []
        self.fails = False
        self.seconds = 0.0  # that a wait takes

    def begin(self, load: Load) -> None:
        self.under_way.append(load)

    def arrive(self, *, is_there: bool = True) -> None:
        """The oldest."""
        self.ended.append(Arrival(self.under_way.pop(0), is_there))

    def finished(self) -> list[Arrival]:
        ended, self.ended = self.ended, []
        return ended

    def promote(self, load: Load) -> None:
        if load in self.under_way:
            self.under_way.remove(load)
        self.ended = [arrival for arrival in self.ended if arrival.load != load]
        self.promoted.append(load)

    def wait(self, load: Load) -> bool:
        time.sleep(self.seconds)
        self.promoted.remove(load)
        self.log.append(f"wait for {load.layer}.{load.expert}")
        return not self.fails

    def cancel(self, load: Load) -> None:
        self.ended = [arrival for arrival in self.ended if arrival.load != load]
        if load in self.under_way:
            self.under_way.remove(load)
        self.log.append(f"cancel {load.layer}.{load.expert}")


def tiny_geometry(num_frames: int, *, expert_bytes: int) -> Geometry:
    """Frames of 100 bytes, two pages of 4 tokens each."""
    return Geometry(
        num_frames=num_frames,
        frame_bytes=100,
        expert_bytes=expert_bytes,
        page_bytes=50,
        page_tokens=4,
        pages_per_frame=2,
        page_rows=24,
    )


class Memory(MemoryManager):
    def __init__(
        self,
        num_frames: int = 8,
        policy: MemoryPolicy = MemoryPolicy.COST_AWARE,
        *,
        num_layers: int = 2,
        floor_frames: int = 1,
    ):
        self.background_loads = Background()
        self.demand: list[str] = []
        super().__init__(
            tiny_geometry(num_frames, expert_bytes=90),
            num_layers=num_layers,
            num_experts=4,
            floor_frames=floor_frames,
            load_experts=self._demand,
            background=self.background_loads,
            policy=policy,
            expert_ratio=0.5,
        )

    def _demand(self, loads: Sequence[Load]) -> None:
        self.demand += [f"{load.layer}.{load.expert}" for load in loads]

    def run(self, layer: int, *experts: int) -> list[list[int]]:
        waves = []
        for wave in self.waves(layer, experts):
            assert self.violations() == []
            waves.append(wave.tolist())
        assert self.violations() == []
        return waves

    def want(self, *experts: str, p: float = 1.0) -> int:
        """Expect these, "layer.expert", after the layer that ran last, and prefetch them."""
        keys = [tuple(map(int, text.split("."))) for text in experts]
        probabilities = np.zeros(self.frame_table.shape)
        for key in keys:
            probabilities[key] = p
        self.expect(-1, probabilities)
        num_begun = self.prefetch(Wanted(layer, expert, p) for layer, expert in keys)
        assert self.violations() == []
        return num_begun

    def residents(self) -> list[str]:
        return [f"{layer}.{e}" for layer, e in np.argwhere(self.frame_table >= 0).tolist()]

    def counts(self) -> tuple[int, int, int, int]:
        """Begun, used, late, wasted."""
        now = self.snapshot(0)
        return (
            now.prefetches_begun,
            now.prefetches_used,
            now.prefetches_late,
            now.prefetches_wasted,
        )
