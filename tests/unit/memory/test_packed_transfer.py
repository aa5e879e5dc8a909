"""Experts that are kept packed in the arena and decoded from there: the store of `test_packed_store`, an arena of 6 frames.

A frame has one expert's bytes; cells are as large as the larger packed one of the two.
"""

from pathlib import Path

import numpy as np
import pytest
from test_packed_store import EXPERT_BYTES, Bench, fill

from sglmoe.memory.arena import Frames
from sglmoe.memory.experts import Load
from sglmoe.memory.host_tier import HostTier, TieredStore, make_blocks
from sglmoe.memory.packed_slabs import PackedSlabs
from sglmoe.memory.transfer import HostCopier


class Arena:
    """Frame 5 is what experts are loaded into; packed ones are in frames 0 and 2 on, so the second cell is in two pieces."""

    def __init__(self, bench: Bench, *, num_blocks: int = 0):
        self.bench = bench
        blocks = make_blocks(10 * num_blocks * EXPERT_BYTES, bench.store, as_stored=True)
        self.tier = HostTier(blocks, num_layers=1, num_experts=2, as_stored=True)
        self.bytes = np.full(6 * EXPERT_BYTES, 170, np.uint8)
        self.copier = HostCopier(
            self.bytes,
            frame_bytes=EXPERT_BYTES,
            store=TieredStore(self.tier, bench.store),
            num_threads=1,
        )
        frames = Frames(6)
        cell_bytes = bench.store.stored_expert_bytes()
        self.slabs = PackedSlabs(frames, (1, 2), frame_bytes=EXPERT_BYTES, cell_bytes=cell_bytes)
        self.slabs.grow()
        frames.take_for_kv()
        self.slabs.grow()
        self.slabs.hold([(0, 0), (0, 1)])

    def load(self, expert: int) -> bytes:
        """Into frame 5, to the end; what is there then."""
        self.bytes[5 * EXPERT_BYTES :] = 0
        load = Load(5, 0, expert, self.slabs.begin(0, expert))
        if finish := self.copier.load([load]):
            finish()
        self.slabs.end(0, expert, is_there=True)
        return self.bytes[5 * EXPERT_BYTES :].tobytes()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def lose_files(bench: Bench) -> None:
    """So that experts come from nowhere else."""
    bench.packed.write_bytes(b"")
    bench.original.write_bytes(b"")


def test_an_expert_is_kept_as_it_comes_and_is_decoded_from_there_bit_for_bit(bench: Bench) -> None:
    arena = Arena(bench)
    for expert in range(2):
        assert arena.load(expert) == bench.expert(expert)
    lose_files(bench)
    for expert in (1, 0, 1):
        assert arena.load(expert) == bench.expert(expert)
    assert (arena.slabs.kept, arena.slabs.hits) == (2, 3)
    assert arena.tier.counters()["disk_reads"] == 2
    assert arena.tier.counters()["disk_bytes"] == 2 * EXPERT_BYTES
    assert arena.copier.bytes_moved == 5 * EXPERT_BYTES
    elsewhere = arena.bytes.reshape(6, EXPERT_BYTES)[[1, 3, 4]]
    assert (elsewhere == 170).all(), "frames 0, 2 and 5 alone were written to"


def test_experts_are_kept_from_host_memory_as_well(bench: Bench) -> None:
    arena = Arena(bench, num_blocks=2)
    assert fill(bench, arena.tier) == 2
    lose_files(bench)
    assert arena.load(1) == bench.expert(1)
    arena.tier.blocks[:] = 0
    assert arena.load(1) == bench.expert(1)
    assert arena.tier.counters()["host_hits"] == 1
    assert arena.tier.violations() == []
    assert arena.tier._pins.tolist() == [0, 0]


def test_what_is_decoded_is_what_is_in_the_arena(bench: Bench) -> None:
    """A bit that is flipped there is in the frame, in the same value: bytes come from nowhere else."""
    arena = Arena(bench)
    arena.load(0)
    arena.bytes[3000] ^= 1  # of the first tensor's tiles
    damaged, sound = (np.frombuffer(its, np.uint16) for its in (arena.load(0), bench.expert(0)))
    assert np.count_nonzero(damaged != sound) == 1


def test_damaged_files_are_never_kept(bench: Bench) -> None:
    bench.flip_a_bit(3000)
    arena = Arena(bench)
    assert arena.load(0) == bench.expert(0), "packed again from the checkpoint"
    lose_files(bench)
    assert arena.load(0) == bench.expert(0)


def test_decoding_is_measured_beside_loading(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(bench)
    noted: list[bool] = []
    monkeypatch.setattr(
        arena.copier.decode_ratio, "note", lambda seconds, *, is_decoded: noted.append(is_decoded)
    )
    for _ in range(3):
        arena.load(0)
    assert noted == [False, True, True]


def test_a_packed_expert_is_not_asked_of_the_disk(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = Arena(bench)
    asked: list[int] = []
    monkeypatch.setattr(bench.store, "will_read", lambda layer, expert: asked.append(expert))
    for expert in (0, 0, 1, 0, 1):
        arena.load(expert)
    assert asked == [0, 1]
