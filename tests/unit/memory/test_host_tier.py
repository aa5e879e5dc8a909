"""Four blocks of host memory for 2 layers of 4 experts."""

import mmap
from collections.abc import Iterator

import numpy as np
import pytest

from sglmoe.memory.host_tier import HALVING_MISSES, HostTier, TieredStore, make_blocks, page_locked
from sglmoe.memory.promotion import Promotion, TierSnapshot
from sglmoe.memory.store import PARTS, ExpertReadError, ExpertStore
from sglmoe.protocol import MemorySnapshot


def expert_bytes(layer: int, expert: int) -> list[int]:
    """Six bytes, two a tensor, that no other expert has."""
    return [16 * (4 * layer + expert) + index // 2 for index in range(6)]


@pytest.fixture
def store() -> ExpertStore:
    store = ExpertStore()
    for layer in range(2):
        for expert in range(4):
            whole = np.array(expert_bytes(layer, expert), np.uint8)
            for index, part in enumerate(PARTS):
                store.put(layer, expert, part, whole[2 * index : 2 * index + 2])
    return store


@pytest.fixture
def tier(store: ExpertStore) -> Iterator[HostTier]:
    tier = HostTier(make_blocks(4 * 6, store), num_layers=2, num_experts=4)
    yield tier
    assert tier.violations() == []


def bring_in(tier: HostTier, store: ExpertStore, *experts: int) -> None:
    """Fill a block with each of these experts of layer 0."""
    for expert in experts:
        block = tier.begin(Promotion(0, expert))
        assert block is not None
        assert tier.violations() == []
        tier.finish(block, store.read(0, expert, tier.blocks[block]))
        assert tier.violations() == []


def look(tier: HostTier) -> TierSnapshot:
    return tier.snapshot(heat=np.zeros((2, 4)), is_resident=np.zeros((2, 4), np.bool_))


def test_it_tells_which_block_holds_which_expert_and_whether_that_is_final(
    tier: HostTier, store: ExpertStore
) -> None:
    bring_in(tier, store, 3, 1)
    blocks = tier.block_table()
    assert blocks.tolist() == [[-1, 1, -1, 0], [-1, -1, -1, -1]]
    blocks[:] = 7  # a copy
    bring_in(tier, store, 0, 2)
    assert tier.block_table().tolist() == [[2, 1, 3, 0], [-1, -1, -1, -1]]
    assert not tier.holds_all  # all blocks are full, and may change hands

    roomy = HostTier(make_blocks(1000, store), num_layers=2, num_experts=4)
    for layer, expert in np.ndindex(2, 4):
        assert not roomy.holds_all
        block = roomy.begin(Promotion(layer, expert))
        assert block is not None
        assert not roomy.holds_all
        roomy.finish(block, 6)
    assert roomy.holds_all


def test_a_missed_expert_is_read_from_disk_once_and_from_host_memory_after_that(
    tier: HostTier, store: ExpertStore
) -> None:
    tiered = TieredStore(tier, store)
    frame = np.full(8, 255, np.uint8)
    assert tiered.read(0, 3, frame) == 6
    bring_in(tier, store, 3)
    frame[:] = 255
    assert tiered.read(0, 3, frame) == 6
    assert frame.tolist() == [*expert_bytes(0, 3), 255, 255]
    assert tier.counters() == {
        "host_hits": 1,
        "disk_reads": 1,
        "disk_bytes": 6,
        "host_promoted": 1,
        "host_promoted_bytes": 6,
        "host_evicted": 0,
        "host_blocks": 4,
        "host_blocks_filled": 1,
    }


def test_the_bytes_really_come_from_the_block(tier: HostTier, store: ExpertStore) -> None:
    bring_in(tier, store, 0, 1)
    tier.blocks[:] = 77  # nobody does this
    frame = np.zeros(6, np.uint8)
    TieredStore(tier, store).read(0, 1, frame)
    assert frame.tolist() == [77] * 6


def test_the_disk_is_asked_ahead_only_for_what_is_not_in_host_memory(
    tier: HostTier, store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(store, "will_read", lambda layer, expert: asked.append(expert))
    bring_in(tier, store, 0, 1)
    for expert in range(4):
        TieredStore(tier, store).will_read(0, expert)
    assert asked == [2, 3]


def test_an_expert_on_its_way_is_read_from_disk(tier: HostTier, store: ExpertStore) -> None:
    """Its block is half full."""
    block = tier.begin(Promotion(1, 2))
    frame = np.zeros(6, np.uint8)
    TieredStore(tier, store).read(1, 2, frame)
    assert frame.tolist() == expert_bytes(1, 2)
    # And it is not planned for a second time.
    assert look(tier).is_here.tolist() == [[False] * 4, [False, False, True, False]]
    assert tier.begin(Promotion(1, 2)) is None
    assert block is not None
    tier.finish(block, 6)


def test_blocks_are_filled_from_the_first_on_and_change_hands(
    tier: HostTier, store: ExpertStore
) -> None:
    bring_in(tier, store, 0, 1, 2, 3)
    assert tier.begin(Promotion(1, 0)) is None  # full, and nobody is told to leave
    assert tier.begin(Promotion(1, 0, victim=(0, 2))) == 2
    assert tier.violations() == []
    assert tier.pin(0, 2) is None
    tier.finish(2, 6)
    assert tier.pin(1, 0) == 2
    assert tier.counters()["host_evicted"] == 1
    tier.unpin(2)


def test_a_pinned_block_is_not_given_away(tier: HostTier, store: ExpertStore) -> None:
    bring_in(tier, store, 0, 1, 2, 3)
    first, second = tier.pin(0, 1), tier.pin(0, 1)
    assert first == second == 1
    tier.unpin(1)
    assert look(tier).is_evictable[0].tolist() == [True, False, True, True]
    assert tier.begin(Promotion(1, 0, victim=(0, 1))) is None
    tier.unpin(1)
    assert tier.begin(Promotion(1, 0, victim=(0, 1))) == 1


def test_an_out_of_date_victim_gives_no_block(tier: HostTier, store: ExpertStore) -> None:
    bring_in(tier, store, 0, 1, 2, 3)
    assert tier.begin(Promotion(1, 0, victim=(0, 1))) == 1
    assert tier.begin(Promotion(1, 1, victim=(0, 1))) is None


def test_an_abandoned_block_is_free_again(tier: HostTier) -> None:
    assert tier.begin(Promotion(0, 0)) == 0
    tier.abandon(0)
    assert tier.violations() == []
    assert (look(tier).num_free, look(tier).is_unreadable.any()) == (4, False)
    assert tier.begin(Promotion(0, 0)) == 0
    tier.abandon(0, unreadable=True)
    assert look(tier).is_unreadable.tolist() == [[True, False, False, False], [False] * 4]
    # A demand load has succeeded since.
    tier.count_disk_read(0, 0, 6)
    assert not look(tier).is_unreadable.any()


def test_misses_count_wherever_the_expert_was_found_and_fade(
    tier: HostTier, store: ExpertStore
) -> None:
    bring_in(tier, store, 0)
    assert not tier.demanded.is_set()
    for _ in range(3):
        tier.unpin(tier.pin(0, 0) or 0)
        tier.pin(1, 1)
    assert tier.demanded.is_set()
    assert look(tier).misses.tolist() == [[3, 0, 0, 0], [0, 3, 0, 0]]
    for _ in range(HALVING_MISSES * 8 - 6):
        tier.pin(1, 1)
    assert look(tier).misses[0, 0] == 1.5


def test_a_disk_that_fails_changes_nothing(tier: HostTier, store: ExpertStore) -> None:
    class Failing(ExpertStore):
        def read(self, *_: object, **__: object) -> int:
            raise ExpertReadError("the disk is gone")

    with pytest.raises(ExpertReadError, match="the disk is gone"):
        TieredStore(tier, Failing()).read(0, 0, np.zeros(6, np.uint8))
    assert tier.counters()["disk_reads"] == 0


def test_counters_are_fields_of_the_snapshot_that_the_scheduler_sees(tier: HostTier) -> None:
    assert set(tier.counters()) <= set(MemorySnapshot.__struct_fields__)


def test_blocks_are_one_expert_each_no_more_than_fit_and_no_more_than_there_are(
    store: ExpertStore,
) -> None:
    assert make_blocks(0, store).shape == (0, 6)
    assert make_blocks(23, store).shape == (3, 6)
    assert make_blocks(10**6, store).shape == (8, 6)
    assert make_blocks(10**6, ExpertStore()).shape == (0, 0)
    with pytest.raises(ValueError, match="--host-memory: 5 B holds no expert, which takes 6 B"):
        make_blocks(5, store)


def test_pages_are_locked_once_for_all_blocks(store: ExpertStore) -> None:
    locked: list[tuple[int, ...]] = []
    make_blocks(24, store, lock_pages=lambda blocks: locked.append(blocks.shape))
    make_blocks(0, store, lock_pages=lambda blocks: locked.append(blocks.shape))
    assert locked == [(4, 6)]


def test_locked_pages_are_shared_with_nobody() -> None:
    """CUDA refuses to lock a page twice: small arrays from the heap lie in one page."""
    locked = [page_locked(2, 6, lambda blocks: None) for _ in range(3)]
    assert len({blocks.ctypes.data // mmap.PAGESIZE for blocks in locked}) == 3
    assert all(blocks.ctypes.data % mmap.PAGESIZE == 0 for blocks in locked)
    assert page_locked(2, 0, lambda blocks: pytest.fail("nothing to lock")).shape == (2, 0)


def test_violations_name_what_is_broken(tier: HostTier, store: ExpertStore) -> None:
    bring_in(tier, store, 0, 1)
    whole = {name: value for name, value in vars(tier).items() if name.startswith("_")}
    tier._free = [3]
    assert tier.violations() == ["free + being filled + holding is not all blocks: [0, 1, 3]"]
    tier._free = whole["_free"]
    tier._block_of[0, 1] = 0
    assert tier.violations() == ["experts and the blocks that hold them are not one to one"]
    tier._block_of[0, 1] = 1
    tier._pins[3] = 1
    assert tier.violations() == ["a block is pinned that holds no expert"]
    tier._pins[3] = 0
    tier._filling[2], tier._free = (0, 0), [3]
    assert tier.violations() == ["an expert that is here is on its way as well"]
    tier._filling.clear()
    tier._free = [3, 2]


@pytest.mark.parametrize("is_here", [False, True])
def test_a_read_can_be_ended_between_two_chunks(
    tier: HostTier, store: ExpertStore, is_here: bool
) -> None:
    if is_here:
        bring_in(tier, store, 1)

    def leave() -> None:
        raise InterruptedError

    frame = np.full(6, 255, np.uint8)
    with pytest.raises(InterruptedError):
        TieredStore(tier, store).read(0, 1, frame, before_chunk=leave)
    assert frame.tolist() == [255] * 6
    assert look(tier).is_evictable[0, 1] == is_here, "no pin is left"
