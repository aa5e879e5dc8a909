"""Moves experts' bytes from host memory or the checkpoint into frames of the arena, on a CPU.

Knows no order of eviction and no table: it is told frame, layer and expert, and returns when the
bytes are there.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Protocol

from sglmoe.memory.experts import Load
from sglmoe.memory.store import Bytes


class ExpertReader(Protocol):
    """A source of experts that several threads may use at a time: an `ExpertStore` or a `TieredStore`."""

    def will_read(self, layer: int, expert: int) -> None: ...

    def read(self, layer: int, expert: int, target: Bytes) -> int: ...


# Arbitrary: so many experts of its share has a thread asked the disk for beyond the one it copies.
READ_AHEAD = 4


class HostCopier:
    """Copies with numpy and `pread`, which let go of the GIL: several experts at a time.

    `arena` is uint8 ``[num_frames * frame_bytes]``.
    """

    def __init__(self, arena: Bytes, *, frame_bytes: int, store: ExpertReader, num_threads: int):
        self._frames = arena.reshape(-1, frame_bytes)  # a view
        self._store = store
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, "expert-copy")
        self.bytes_moved = 0

    def load(self, loads: Sequence[Load]) -> None:
        """Return when all are in their frames. If it raises, none of these may be used."""
        if len(loads) == 1:
            self.bytes_moved += self._copy(loads)
            return
        shares = (loads[start :: self._num_threads] for start in range(self._num_threads))
        copies = [self._threads.submit(self._copy, share) for share in shares if share]
        wait(copies)  # even if one fails: nothing may write into a frame once this has raised
        self.bytes_moved += sum(copy.result() for copy in copies)

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown()

    def _copy(self, loads: Sequence[Load]) -> int:
        num_bytes = 0
        for load in loads[:READ_AHEAD]:
            self._store.will_read(load.layer, load.expert)
        for index, load in enumerate(loads):
            for ahead in loads[index + READ_AHEAD : index + READ_AHEAD + 1]:
                self._store.will_read(ahead.layer, ahead.expert)
            num_bytes += self._store.read(load.layer, load.expert, self._frames[load.frame])
        return num_bytes
