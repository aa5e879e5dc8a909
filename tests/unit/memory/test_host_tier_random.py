"""Random demands, promotions and faults: whoever reads an expert finds its bytes, and the laws hold.

Four blocks, 2 layers of 4 experts. An expert's bytes are its number, so a block that changes under a
reader, or that is given out half full, shows as wrong contents, whatever the counters say.
"""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglmoe.memory.host_tier import HostTier, TieredStore
from sglmoe.memory.link_gate import LinkGate
from sglmoe.memory.promoter import Promoter
from sglmoe.memory.promotion import Promotion
from sglmoe.memory.store import Bytes, ExpertReadError, ExpertStore

LAYERS, EXPERTS = st.integers(0, 1), st.integers(0, 3)
ALL = [(layer, expert) for layer in range(2) for expert in range(4)]


def number(layer: int, expert: int) -> int:
    return 100 + 10 * layer + expert


class FaultyDisk(ExpertStore):
    """Reads half of an expert before it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: set[tuple[int, int]] = set()

    def read(
        self,
        layer: int,
        expert: int,
        target: Bytes,
        *,
        before_chunk: Callable[[], None] | None = None,
    ) -> int:
        target[:3] = number(layer, expert)
        if (layer, expert) in self.bad:
            raise ExpertReadError("the disk is gone")
        target[3:6] = number(layer, expert)
        return 6


class TierMachine(RuleBasedStateMachine):
    """A copier that keeps pins as long as it likes, a promoter, and a disk that fails at times."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = FaultyDisk()
        self.tier = HostTier(np.zeros((4, 6), np.uint8), num_layers=2, num_experts=4)
        self.tiered = TieredStore(self.tier, self.disk)
        self.heat = np.zeros((2, 4))
        self.residents = np.zeros((2, 4), np.bool_)
        self.promoter = Promoter(
            self.tier,
            self.disk,
            LinkGate(),
            heat=lambda: self.heat,
            residents=lambda: self.residents,
        )
        self.pins: list[tuple[int, int]] = []  # (block, number that must stay in it)
        self.open: tuple[int, tuple[int, int]] | None = None  # a block being filled, and with whom
        self.barred: set[tuple[int, int]] = set()
        self.num_hits = self.num_disk_reads = self.num_promoted = 0

    # -------------------------------------------------------------------------------------- demand

    @rule(layer=LAYERS, expert=EXPERTS)
    def load(self, layer: int, expert: int) -> None:
        is_here = self.tier.holds(layer, expert)
        frame = np.zeros(6, np.uint8)
        if not is_here and (layer, expert) in self.disk.bad:
            with pytest.raises(ExpertReadError):
                self.tiered.read(layer, expert, frame)
            return
        self.tiered.read(layer, expert, frame)
        assert frame.tolist() == [number(layer, expert)] * 6
        self.num_hits += is_here
        self.num_disk_reads += not is_here
        if not is_here:
            self.barred.discard((layer, expert))

    @rule(layer=LAYERS, expert=EXPERTS)
    def begin_copy(self, layer: int, expert: int) -> None:
        """An asynchronous copy: the block stays pinned after `pin` has returned."""
        block = self.tier.pin(layer, expert)
        assert (block is not None) == self.tier.holds(layer, expert)
        if block is not None:
            self.num_hits += 1
            self.pins.append((block, number(layer, expert)))

    @precondition(lambda self: self.pins)
    @rule(choice=st.integers(0, 99))
    def end_copy(self, choice: int) -> None:
        block, _ = self.pins.pop(choice % len(self.pins))
        self.tier.unpin(block)

    @rule(layer=LAYERS, expert=EXPERTS, heat=st.integers(0, 9), is_resident=st.booleans())
    def change_frames(self, layer: int, expert: int, heat: int, is_resident: bool) -> None:
        self.heat[layer, expert] = heat
        self.residents[layer, expert] = is_resident

    # ---------------------------------------------------------------------------------- background

    @rule()
    def promote(self) -> None:
        before = self.here()
        num_came = self.promoter.promote_some()
        came, gone = self.here() - before, before - self.here()
        assert num_came == len(came)
        unreadable = {expert for expert in ALL if self.look().is_unreadable[expert]}
        # Whoever gave way to an expert that then could not be read has left a free block.
        assert len(gone) <= num_came + len(unreadable - self.barred)
        assert not gone & {expert for expert in ALL if number(*expert) in dict(self.pins).values()}
        assert not came & (self.disk.bad | self.barred)
        self.barred = unreadable
        self.num_promoted += num_came

    @precondition(lambda self: self.open is None)
    @rule(layer=LAYERS, expert=EXPERTS, victim=st.none() | st.sampled_from(ALL))
    def begin(self, layer: int, expert: int, victim: tuple[int, int] | None) -> None:
        """A plan that may be long out of date."""
        was_here = self.tier.holds(layer, expert)
        block = self.tier.begin(Promotion(layer, expert, victim))
        if block is None:
            return
        assert not was_here
        self.open = (block, (layer, expert))
        self.tier.blocks[block] = 255

    @precondition(lambda self: self.open is not None)
    @rule(succeeds=st.booleans())
    def end(self, succeeds: bool) -> None:
        assert self.open is not None
        block, expert = self.open
        self.open = None
        if not succeeds:
            self.tier.abandon(block)
            assert not self.tier.holds(*expert)
            return
        self.tier.blocks[block] = number(*expert)
        self.tier.finish(block, 6)
        self.num_promoted += 1

    @rule(layer=LAYERS, expert=EXPERTS, is_bad=st.booleans())
    def change_disk(self, layer: int, expert: int, is_bad: bool) -> None:
        (self.disk.bad.add if is_bad else self.disk.bad.discard)((layer, expert))

    # ---------------------------------------------------------------------------------------- laws

    def look(self):  # type: ignore[no-untyped-def]
        return self.tier.snapshot(heat=self.heat, is_resident=self.residents)

    def here(self) -> set[tuple[int, int]]:
        return {expert for expert in ALL if self.tier.holds(*expert)}

    @invariant()
    def laws_hold(self) -> None:
        assert self.tier.violations() == []

    @invariant()
    def blocks_hold_what_they_should(self) -> None:
        for block, value in self.pins:
            assert self.tier.blocks[block].tolist() == [value] * 6
        for layer, expert in self.here():
            block = self.tier._block_of[layer, expert]
            assert self.tier.blocks[block].tolist() == [number(layer, expert)] * 6

    @invariant()
    def counters_tell_what_happened(self) -> None:
        counters = self.tier.counters()
        assert counters["host_hits"] == self.num_hits
        assert counters["disk_reads"] * 6 == counters["disk_bytes"] == self.num_disk_reads * 6
        assert counters["host_promoted"] == self.num_promoted
        assert counters["host_blocks_filled"] == len(self.here())
        assert self.num_promoted - counters["host_evicted"] == len(self.here())


TierMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, derandomize=True, database=None
)
TestHostTier = TierMachine.TestCase
