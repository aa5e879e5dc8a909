"""Experts in host memory: the tier between the frames and the checkpoint on disk.

Equal blocks of one expert each, cut from one allocation. Knows which expert is in which block and
how often the frames missed each expert, neither reads a file nor picks victims. Many threads may
look for experts at a time, one at a time brings them in.
"""

import mmap
import threading
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.errors import budgets
from sglmoe.memory.experts import ABSENT
from sglmoe.memory.promotion import Promotion, TierSnapshot
from sglmoe.memory.store import CHUNK_BYTES, Bytes, ExpertStore

# Miss counts are halved after so many misses for each expert of the model: TinyLFU (Einziger et al.
# 2017, section 3.3) ages so, after 8 to 10 times the size of its cache.
HALVING_MISSES = 8


class _Counters(msgspec.Struct):
    """Totals since the start; see `MemorySnapshot`."""

    host_hits: int = 0
    disk_reads: int = 0
    disk_bytes: int = 0
    host_promoted: int = 0
    host_promoted_bytes: int = 0
    host_evicted: int = 0


class HostTier:
    """`blocks` is uint8 `[num_blocks, block_bytes]`; `num_blocks` may be 0.

    A block is free, being filled, or holds an expert: as it lies in a frame, or with `as_stored` as the
    store has it, which may be smaller. What it holds does not change while it is pinned.
    """

    def __init__(
        self, blocks: Bytes, *, num_layers: int, num_experts: int, as_stored: bool = False
    ):
        self.blocks = blocks
        self.as_stored = as_stored
        self.demanded = threading.Event()  # set when an expert was missed; cleared by whoever waits
        self._lock = threading.Lock()  # over all that follows
        self._block_of = np.full((num_layers, num_experts), ABSENT, np.int32)
        self._expert_of: dict[int, tuple[int, int]] = {}  # block -> (layer, expert) that it holds
        self._filling: dict[int, tuple[int, int]] = {}  # block -> (layer, expert) on its way
        self._free = list(range(len(blocks)))[::-1]
        self._pins: npt.NDArray[np.int32] = np.zeros(len(blocks), np.int32)
        self._misses: npt.NDArray[np.float32] = np.zeros(self._block_of.shape, np.float32)
        self._misses_left = HALVING_MISSES * self._misses.size
        self._is_unreadable: npt.NDArray[np.bool_] = np.zeros(self._block_of.shape, np.bool_)
        self._counters = _Counters()

    # ------------------------------------------------------------------------------------ demand

    def pin(self, layer: int, expert: int) -> int | None:
        """Count that the frames missed this expert; the block that holds it, pinned, or None."""
        with self._lock:
            self._count_miss(layer, expert)
            block = int(self._block_of[layer, expert])
            if block == ABSENT:
                return None
            self._pins[block] += 1
            self._counters.host_hits += 1
            return block

    def unpin(self, block: int) -> None:
        with self._lock:
            assert self._pins[block], f"block {block} has no pin"
            self._pins[block] -= 1

    def holds(self, layer: int, expert: int) -> bool:
        """Whether a block holds the expert at this moment."""
        return bool(self._block_of[layer, expert] != ABSENT)

    def held(self) -> npt.NDArray[np.bool_]:
        """`holds` of all experts: bool `[num_layers, num_experts]`."""
        held: npt.NDArray[np.bool_] = self._block_of != ABSENT
        return held

    @property
    def holds_all(self) -> bool:
        """Whether every expert has a block; then none changes hands any more."""
        return len(self._expert_of) == self._block_of.size

    def block_table(self) -> npt.NDArray[np.int32]:
        """The block that holds each expert, ABSENT: none: int32 `[num_layers, num_experts]`."""
        with self._lock:
            return self._block_of.copy()

    def count_disk_read(self, layer: int, expert: int, num_bytes: int) -> None:
        """A missed expert was not here and has been read from the checkpoint."""
        with self._lock:
            self._is_unreadable[layer, expert] = False
            self._counters.disk_reads += 1
            self._counters.disk_bytes += num_bytes

    # --------------------------------------------------------------------------------- promotion

    def begin(self, promotion: Promotion) -> int | None:
        """A block to fill with the expert, and to be handed to `finish` or `abandon`.

        A free one, or the victim's. None where the plan is out of date: the expert is here by now,
        or the victim is pinned or gone.
        """
        with self._lock:
            expert = (promotion.layer, promotion.expert)
            if self._block_of[expert] != ABSENT or expert in self._filling.values():
                return None
            block = self._free.pop() if self._free else self._evict(promotion.victim)
            if block is not None:
                self._filling[block] = expert
            return block

    def finish(self, block: int, num_bytes: int) -> None:
        """The expert's bytes are in the block."""
        with self._lock:
            expert = self._filling.pop(block)
            self._expert_of[block] = expert
            self._block_of[expert] = block
            self._counters.host_promoted += 1
            self._counters.host_promoted_bytes += num_bytes

    def abandon(self, block: int, *, unreadable: bool = False) -> None:
        """The block was not filled; an unreadable expert is not planned for until a demand load has read it."""
        with self._lock:
            expert = self._filling.pop(block)
            self._is_unreadable[expert] |= unreadable
            self._free.append(block)

    def _evict(self, victim: tuple[int, int] | None) -> int | None:
        block = ABSENT if victim is None else int(self._block_of[victim])
        if block == ABSENT or self._pins[block]:
            return None
        self._block_of[self._expert_of.pop(block)] = ABSENT
        self._counters.host_evicted += 1
        return block

    def _count_miss(self, layer: int, expert: int) -> None:
        self._misses[layer, expert] += 1
        self._misses_left -= 1
        if not self._misses_left:
            self._misses *= 0.5
            self._misses_left = HALVING_MISSES * self._misses.size
        if not self.demanded.is_set():
            self.demanded.set()

    # ------------------------------------------------------------------------------- state, laws

    def snapshot(
        self, *, heat: npt.NDArray[np.float64], is_resident: npt.NDArray[np.bool_]
    ) -> TierSnapshot:
        """What a plan is made from; `heat` and `is_resident` are of the experts in frames, see there."""
        with self._lock:
            is_here: npt.NDArray[np.bool_] = self._block_of != ABSENT
            is_evictable = is_here.copy()
            for block in np.flatnonzero(self._pins).tolist():
                is_evictable[self._expert_of[block]] = False
            for expert in self._filling.values():
                is_here[expert] = True
            return TierSnapshot(
                misses=self._misses.copy(),
                heat=heat.copy(),
                is_resident=is_resident,
                is_here=is_here,
                is_evictable=is_evictable,
                is_unreadable=self._is_unreadable.copy(),
                num_free=len(self._free),
            )

    def counters(self) -> dict[str, int]:
        """Those fields of `MemorySnapshot` that are this tier's."""
        with self._lock:
            return {
                **msgspec.structs.asdict(self._counters),
                "host_blocks": len(self.blocks),
                "host_blocks_filled": len(self._expert_of),
            }

    def violations(self) -> list[str]:
        """Each law of the tier that does not hold, in words."""
        with self._lock:
            held = {
                int(self._block_of[layer, expert]): (layer, expert)
                for layer, expert in np.argwhere(self._block_of != ABSENT).tolist()
            }
            found = []
            if held != self._expert_of:
                found.append("experts and the blocks that hold them are not one to one")
            owners = [*self._free, *self._filling, *self._expert_of]
            if sorted(owners) != list(range(len(self.blocks))):
                found.append(f"free + being filled + holding is not all blocks: {sorted(owners)}")
            if any(self._block_of[expert] != ABSENT for expert in self._filling.values()):
                found.append("an expert that is here is on its way as well")
            if any(block not in self._expert_of for block in np.flatnonzero(self._pins).tolist()):
                found.append("a block is pinned that holds no expert")
            return found


class TieredStore:
    """Reads missed experts: from host memory where they are there, from the store otherwise."""

    def __init__(self, tier: HostTier, store: ExpertStore):
        self._tier = tier
        self._store = store

    def will_read(self, layer: int, expert: int) -> None:
        """Begin to read the expert, if it is not in host memory; `read` is to follow soon."""
        if not self._tier.holds(layer, expert):
            self._store.will_read(layer, expert)

    def read(
        self,
        layer: int,
        expert: int,
        target: Bytes,
        *,
        before_chunk: Callable[[], None] | None = None,
    ) -> int:
        """Copy the expert to the start of `target`, which a block fits in; its bytes.

        `before_chunk` as in `ExpertStore.read`. Raises ExpertReadError.
        """
        block = self._tier.pin(layer, expert)
        if block is None:
            num_bytes = self._store.read(layer, expert, target, before_chunk=before_chunk)
            self._tier.count_disk_read(layer, expert, num_bytes)
            return num_bytes
        source = self._tier.blocks[block]
        step = source.nbytes if before_chunk is None else CHUNK_BYTES
        try:
            if self._tier.as_stored:
                return self._store.unpack(
                    layer, expert, [source], target, before_chunk=before_chunk
                )
            for start in range(0, source.nbytes, step):
                if before_chunk is not None:
                    before_chunk()
                part = source[start : start + step]
                target[start : start + part.nbytes] = part
        finally:
            self._tier.unpin(block)
        return int(source.nbytes)

    def read_and_keep(self, layer: int, expert: int, target: Bytes, kept: Sequence[Bytes]) -> int:
        """As `read`, and keep the expert as it is stored: see `ExpertStore.read_and_keep`."""
        block = self._tier.pin(layer, expert)
        if block is None:
            num_bytes = self._store.read_and_keep(layer, expert, target, kept)
            self._tier.count_disk_read(layer, expert, num_bytes)
            return num_bytes
        try:
            stored = self._tier.blocks[block]
            return self._store.unpack_and_keep(layer, expert, stored, target, kept)
        finally:
            self._tier.unpin(block)

    def unpack(self, layer: int, expert: int, stored: Sequence[Bytes], target: Bytes) -> int:
        """See `ExpertStore.unpack`."""
        return self._store.unpack(layer, expert, stored, target)


def block_bytes(store: ExpertStore, *, as_stored: bool) -> int:
    """What the largest expert takes in a block."""
    return store.stored_expert_bytes() if as_stored else store.expert_bytes()


def block_reader(tier: HostTier, store: ExpertStore) -> Callable[..., int]:
    """What reads an expert as the tier's blocks hold it: as `ExpertStore.read`."""
    return store.read_stored if tier.as_stored else store.read


def make_blocks(
    host_bytes: int,
    store: ExpertStore,
    *,
    as_stored: bool = False,
    lock_pages: Callable[[Bytes], None] | None = None,
) -> Bytes:
    """As many blocks of exactly one expert as fit into `host_bytes`, and no more than there are experts.

    uint8 `[num_blocks, block_bytes]`; `as_stored`: see `HostTier`. `lock_pages` keeps all of them in
    physical memory; without it memory is taken as blocks are filled. Raises ValueError where not one fits.
    """
    expert_bytes = block_bytes(store, as_stored=as_stored)
    num_blocks = min(host_bytes // max(1, expert_bytes), len(store.experts()))
    if not num_blocks and host_bytes and expert_bytes:
        raise budgets.host_memory_holds_no_expert(host_bytes=host_bytes, expert_bytes=expert_bytes)
    if lock_pages is None:
        return np.empty((num_blocks, expert_bytes), np.uint8)
    return page_locked(num_blocks, expert_bytes, lock_pages)


def page_locked(num_blocks: int, num_bytes: int, lock_pages: Callable[[Bytes], None]) -> Bytes:
    """uint8 `[num_blocks, num_bytes]`, kept in physical memory.

    In pages that nothing else is in: CUDA refuses to lock a page for two allocations.
    """
    if not num_blocks * num_bytes:
        return np.empty((num_blocks, num_bytes), np.uint8)
    pages = mmap.mmap(-1, num_blocks * num_bytes)
    blocks = np.frombuffer(pages, np.uint8).reshape(num_blocks, num_bytes)
    lock_pages(blocks)
    return blocks
