"""Moves experts' bytes from host memory or the checkpoint into frames of the arena, on a CPU.

Knows no order of eviction and no table: it is told frame, layer and expert, and returns when the
bytes are there.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

from sglmoe.memory.decode_ratio import DecodeRatio
from sglmoe.memory.experts import Load
from sglmoe.memory.link_gate import Finish
from sglmoe.memory.store import Bytes


class ExpertReader(Protocol):
    """A source of experts that several threads may use at a time: an `ExpertStore` or a `TieredStore`."""

    def will_read(self, layer: int, expert: int) -> None: ...

    def read(
        self,
        layer: int,
        expert: int,
        target: Bytes,
        *,
        before_chunk: Callable[[], None] | None = None,
    ) -> int: ...

    def read_and_keep(
        self, layer: int, expert: int, target: Bytes, kept: Sequence[Bytes]
    ) -> int: ...

    def unpack(self, layer: int, expert: int, stored: Sequence[Bytes], target: Bytes) -> int: ...


# Arbitrary: so many experts of its share has a thread asked the disk for beyond the one it copies.
READ_AHEAD = 4
# Arbitrary: copying less (20 us) takes no longer than waking a thread that does it.
SMALL_BYTES = 256 * 2**10


class HostCopier:
    """Copies with numpy and `pread`, which let go of the GIL: several experts at a time.

    `arena` is uint8 ``[num_frames * frame_bytes]``.
    """

    def __init__(
        self,
        arena: Bytes,
        *,
        frame_bytes: int,
        store: ExpertReader,
        num_threads: int,
        small_bytes: int = SMALL_BYTES,
    ):
        self._arena = arena
        self._frames = arena.reshape(-1, frame_bytes)  # a view
        self._store = store
        self._num_threads = num_threads
        self._small_bytes = small_bytes
        self._threads = ThreadPoolExecutor(num_threads, "expert-copy")
        self.bytes_moved = 0
        self.decode_ratio = DecodeRatio()

    def load(self, loads: Sequence[Load]) -> Finish | None:
        """See `LoadExperts`."""
        if len(loads) * self._frames.shape[1] <= self._small_bytes:
            num_bytes, _ = self._copy(loads)
            self.bytes_moved += num_bytes
            return None
        started = time.perf_counter()
        shares = (loads[start :: self._num_threads] for start in range(self._num_threads))
        copies = [self._threads.submit(self._copy, share) for share in shares if share]
        return lambda: self._finish(copies) - started

    def copy_in_background(self, load: Load, _mark: None, before_chunk: Callable[[], None]) -> None:
        """Return when the expert is in its frame, which nobody reads. What `before_chunk` raises ends it in the middle."""
        self._store.will_read(load.layer, load.expert)
        target = self._frames[load.frame]
        self._store.read(load.layer, load.expert, target, before_chunk=before_chunk)

    def _finish(self, copies: Sequence[Future[tuple[int, float]]]) -> float:
        """When the last of them was there."""
        wait(copies)  # even if one fails: nothing may write into a frame once this has raised
        results = [copy.result() for copy in copies]
        self.bytes_moved += sum(num_bytes for num_bytes, _ in results)
        return max(ended_at for _, ended_at in results)

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown()

    def _copy(self, loads: Sequence[Load]) -> tuple[int, float]:
        """How many bytes, and when that was done."""
        num_bytes = 0
        for load in loads[:READ_AHEAD]:
            self._will_read(load)
        for index, load in enumerate(loads):
            for ahead in loads[index + READ_AHEAD : index + READ_AHEAD + 1]:
                self._will_read(ahead)
            started = time.perf_counter()
            num_bytes += self._read(load)
            self.decode_ratio.note(time.perf_counter() - started, is_decoded=load.is_packed)
        return num_bytes, time.perf_counter()

    def _will_read(self, load: Load) -> None:
        if not load.is_packed:
            self._store.will_read(load.layer, load.expert)

    def _read(self, load: Load) -> int:
        """From the arena, if the expert is packed there; else from the store, to be kept there where it has a cell."""
        layer, expert, target = load.layer, load.expert, self._frames[load.frame]
        if load.cell is None:
            return self._store.read(layer, expert, target)
        pieces = [self._arena[start:stop] for start, stop in load.cell.runs]
        if load.cell.is_filled:
            return self._store.unpack(layer, expert, pieces, target)
        return self._store.read_and_keep(layer, expert, target, pieces)
