"""Moves experts' bytes from the store into frames of the arena, in host memory.

Knows no order of eviction and no table: it is told frame, layer and expert, and returns when the
bytes are there.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from sglmoe.memory.experts import Load
from sglmoe.memory.store import Bytes, ExpertStore


class HostCopier:
    """Copies with numpy, which lets go of the GIL: several experts at a time, page faults of a
    mapped file included.

    `arena` is uint8 ``[num_frames * frame_bytes]``.
    """

    def __init__(self, arena: Bytes, *, frame_bytes: int, store: ExpertStore, num_threads: int):
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
        return sum(
            self._store.read(load.layer, load.expert, self._frames[load.frame]) for load in loads
        )
