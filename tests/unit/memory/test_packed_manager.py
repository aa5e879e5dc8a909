"""Packed experts under the one budget: 8 frames of 100 bytes, one expert or 2 pages of 4 tokens each; packed, one takes 70.

2 layers of 4 experts; one frame is the floor. Decoding takes a tenth of loading, if nothing else is said.
"""

from array import array
from collections.abc import Sequence

import numpy as np
import pytest
from prefetched_memory import Background, tiny_geometry
from step_without_host import run_step

from sglmoe.config import MemoryPolicy
from sglmoe.memory.experts import Load
from sglmoe.memory.link_gate import Finish
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.packed_order import Packing
from sglmoe.memory.prefetch import Wanted


def tokens(num_tokens: int) -> bytes:
    return array("i", range(num_tokens)).tobytes()


class Memory(MemoryManager):
    """Keeps what it was told to load: `0.1` from below, `0.1 kept` too, `0.1 decoded` from the arena."""

    def __init__(self, *, ratio: float = 0.1, share: float | None = None, floor_frames: int = 1):
        self.log: list[str] = []
        self.fails = False
        self.is_slow = False
        self.ratio = ratio
        super().__init__(
            tiny_geometry(8, expert_bytes=100),
            num_layers=2,
            num_experts=4,
            floor_frames=floor_frames,
            load_experts=self._load,
            policy=MemoryPolicy.COST_AWARE,
            background=Background(),
            packing=Packing(70, lambda: self.ratio, share),
        )

    def _load(self, loads: Sequence[Load]) -> Finish | None:
        if self.fails:
            raise OSError("the disk is gone")
        for load in loads:
            how = "" if load.cell is None else (" decoded" if load.cell.is_filled else " kept")
            self.log.append(f"{load.layer}.{load.expert}{how}")
        return (lambda: 0.0) if self.is_slow else None

    def run(self, layer: int, *experts: int) -> list[list[int]]:
        """Compute a layer; its waves."""
        waves = []
        for wave in self.waves(layer, experts):
            assert self.violations() == []
            waves.append(wave.tolist())
        assert self.violations() == []
        return waves

    def run_all(self) -> None:
        self.begin_step()
        for layer in range(2):
            self.run(layer, 0, 1, 2, 3)

    def kv(self, rid: str, num_frames: int) -> bool:
        """A request grows to so many frames of KV."""
        if rid not in self._requests:
            self.admit(rid, tokens(100), namespace=rid)
        fits = self.extend(rid, 8 * num_frames)
        assert self.violations() == []
        return fits

    @property
    def packed(self) -> int:
        return self.snapshot(0).packed_frames


def packed_memory(**arguments: float) -> Memory:
    """Three frames hold all of layer 1 packed; the others are free."""
    memory = Memory(**arguments)  # type: ignore[arg-type]
    memory.pack(3, [(1, expert) for expert in range(4)])
    memory.run(1, 0, 1, 2, 3)
    assert memory.log == ["1.0 kept", "1.1 kept", "1.2 kept", "1.3 kept"]
    memory.log.clear()
    return memory


def test_what_was_kept_is_decoded_from_the_arena_the_next_time() -> None:
    memory = packed_memory()
    memory.run_all()
    memory.run_all()
    assert "1.0 decoded" in memory.log
    assert not any("kept" in its or its == "1.0" for its in memory.log)
    snapshot = memory.snapshot(0)
    assert (snapshot.packed_frames, snapshot.packed_experts, snapshot.packed_kept) == (3, 4, 4)
    assert snapshot.packed_hits == sum("decoded" in its for its in memory.log)
    assert snapshot.expert_misses == 4 + len(memory.log)
    assert snapshot.free_frames + snapshot.expert_frames + snapshot.packed_frames == 8


def test_a_load_that_fails_keeps_nothing() -> None:
    memory = Memory()
    memory.pack(3, [(1, 0)])
    memory.fails = True
    with pytest.raises(OSError, match="gone"):
        memory.run(1, 0)
    memory.fails = False
    memory.run(1, 0)
    assert memory.log == ["1.0 kept"]


def test_packed_experts_take_frames_from_ready_ones_and_never_from_prefixes() -> None:
    memory = Memory()
    assert memory.kv("a", 2)
    memory.release("a", tokens(16), 16)  # a cached prefix of two frames
    memory.run(0, 0, 1, 2, 3)
    memory.run(1, 0, 1)
    memory.pack(5, [])
    snapshot = memory.snapshot(0)
    assert (snapshot.packed_frames, snapshot.expert_frames, snapshot.kv_frames) == (5, 1, 2)
    assert snapshot.cached_pages == 4


def test_the_floor_is_left_to_frames_of_experts() -> None:
    memory = Memory(floor_frames=2)
    memory.pack(8, [])
    assert memory.packed == 6
    assert memory.kv("a", 3)
    memory.pack(8, [])
    assert memory.packed == 3


def test_fewer_frames_are_given_back_by_value() -> None:
    memory = packed_memory()
    for _ in range(8):
        memory.begin_step()
        memory.run(1, 0, 1)  # cells 0 and 1: the first two places
    memory.pack(2, [(1, expert) for expert in range(4)])
    assert memory.packed == 2
    assert memory.is_packed[1].tolist() == [True, True, False, False]


def test_kv_takes_back_what_it_needs_at_once() -> None:
    memory = packed_memory()
    assert memory.kv("a", 7), "all but the floor"
    assert memory.packed <= 1
    assert memory.snapshot(0).kv_frames == 7


def test_where_decoding_takes_as_long_as_loading_packed_experts_go_first() -> None:
    memory = packed_memory(ratio=1.0)
    memory.run(0, 0, 1)
    assert memory.packed == 2, "4 ready, 3 packed, and one frame free: one had to go"
    assert memory.run(0, 2) == [[2]]
    assert memory.packed == 1
    assert memory.snapshot(0).expert_frames == 7


def test_where_it_is_quick_ready_copies_of_packed_experts_go_first() -> None:
    memory = packed_memory()
    memory.run(0, 0, 1, 2, 3)
    assert memory.packed == 3
    assert (memory.frame_table[0] >= 0).all()
    assert (memory.frame_table[1] >= 0).sum() == 1


def test_a_layer_takes_another_wave_before_it_sweeps_packed_experts_out() -> None:
    """Five packed frames that hold seven experts, three for four that are needed at once."""
    memory = Memory()
    memory.pack(5, [(layer, expert) for layer in range(2) for expert in range(4)])
    assert [len(wave) for wave in memory.run(1, 0, 1, 2, 3)] == [3, 1]
    assert memory.packed == 5


def test_but_takes_a_frame_where_there_is_none_for_even_one_expert() -> None:
    memory = Memory()
    assert memory.kv("a", 6)
    memory.pack(8, [(0, 0)])
    assert memory.packed == 1
    assert memory.kv("a", 7), "the one that was left for experts"
    assert (memory.packed, memory.snapshot(0).free_frames) == (1, 0)
    assert memory.run(1, 0, 1) == [[0], [1]]
    assert memory.packed == 0


def test_a_cell_that_is_read_stays_while_its_layer_looks_for_frames() -> None:
    """Decoding does not pay any more, so the third load would take the frame from which the first is decoded."""
    memory = Memory()
    memory.pack(1, [(1, 0)])
    memory.run(1, 0, 1)
    memory.run(0, 0, 1, 2, 3)
    assert memory.kv("a", 2), "one free, and that of 1.0, which is packed"
    memory.release("a", b"", 0)
    memory.log.clear()
    memory.ratio = 1.0
    memory.run(1, 0, 2, 3)
    assert memory.log == ["1.0 decoded", "1.2", "1.3"]
    assert memory.packed == 1


def test_a_cell_that_is_read_is_no_room_for_kv() -> None:
    """1.1 is pinned, 1.0 on its way out of the packed frame: beside these, and 4 of KV, one is free."""
    memory = Memory()
    memory.pack(1, [(1, 0)])
    memory.run(1, 0)
    assert memory.kv("a", 7), "1.0 is packed alone now"
    memory.release("a", b"", 0)
    memory.run(1, 1)
    assert memory.kv("b", 4)
    memory.is_slow = True
    wave = memory.waves(1, [0, 1])
    assert next(wave).tolist() == [1]
    assert memory.log[-1] == "1.0 decoded"
    assert not memory.kv("b", 6)
    assert memory.kv("b", 5)
    wave.close()
    assert memory.kv("b", 7)


def test_a_share_gives_way_to_kv_in_step_with_the_experts_in_frames() -> None:
    memory = Memory(share=0.5)
    memory.pack(4, [(1, expert) for expert in range(4)])
    memory.run(0, 0, 1, 2, 3)
    found = []
    for num_frames in range(1, 7):
        assert memory.kv("a", num_frames)
        snapshot = memory.snapshot(0)
        found.append((snapshot.packed_frames, snapshot.expert_frames))
    assert found == [(4, 3), (3, 3), (3, 2), (2, 2), (2, 1), (1, 1)]


def test_a_prefix_that_is_worth_less_than_experts_goes_before_a_share_too() -> None:
    """With 2 frames of KV, 4 packed ones are one more than half of the rest."""
    memory = Memory(share=0.5)
    memory.set_prices(expert_nanoseconds=10**9, token_nanoseconds=1)
    assert memory.kv("a", 2)
    memory.release("a", tokens(16), 16)
    memory.pack(4, [])
    memory.run(0, 0, 1)
    assert memory.kv("b", 1)
    assert (memory.packed, memory.snapshot(0).cached_pages) == (4, 2)


def test_a_share_gives_way_to_kv_in_the_middle_of_a_wave_too() -> None:
    """The two experts in frames are pinned, and two packed frames are their share."""
    memory = Memory(share=0.5)
    memory.pack(2, [(1, 0)])
    assert memory.kv("a", 4)
    wave = memory.waves(0, [0, 1])
    next(wave)
    assert memory.kv("a", 5)
    assert memory.packed == 1
    wave.close()


def test_with_a_share_loads_leave_packed_experts_alone_even_if_they_save_nothing() -> None:
    memory = Memory(share=0.5, ratio=1.0)
    memory.pack(4, [(1, expert) for expert in range(4)])
    for _ in range(3):
        memory.run_all()
    assert memory.packed == 4
    assert memory.snapshot(0).packed_hits > 0


@pytest.mark.parametrize(("ratio", "num_frames"), [(1.0, [3, 2, 1, 1]), (0.1, [3, 3, 3, 3])])
def test_those_that_save_nothing_make_way_for_what_steps_without_the_host_missed(
    ratio: float, num_frames: list[int]
) -> None:
    memory = packed_memory(ratio=ratio)
    seen = []
    for routed in ({0}, {1}, set[int](), {0}):
        memory.begin_step()
        sets = memory.lend(1)
        assert sets is not None
        seen.append(memory.packed)
        assert not set(memory._slabs.held_frames()) & set(sets.frames.ravel().tolist())
        outcome = run_step(sets, [routed, {0}])
        memory.take_back(outcome.sets)
        assert memory.violations() == []
    assert seen == num_frames


def test_what_is_packed_is_not_prefetched() -> None:
    memory = Memory()
    memory.pack(1, [(1, 0)])
    memory.run(1, 0)
    assert memory.kv("a", 7), "1.0 is packed alone now"
    memory.release("a", b"", 0)
    memory.begin_step()
    assert memory.prefetch([Wanted(1, 0, 0.9), Wanted(1, 1, 0.9)]) == 1
    assert list(memory._table.loading) == [(1, 1)]


def test_clearing_forgets_them_too() -> None:
    memory = packed_memory()
    memory.clear()
    assert memory.snapshot(0).free_frames == 8
    assert not memory.is_packed.any()
    assert memory.violations() == []


def test_they_are_drawn() -> None:
    memory = packed_memory()
    memory.run(0, 0, 1, 2, 3)
    drawn = memory.draw(np.zeros((2, 4), np.bool_))
    assert drawn.frames.count("p") == 3
    assert drawn.residency[0] == "rrrr"
    assert sorted(drawn.residency[1]) == ["p", "p", "p", "r"]
