"""Moves experts' bytes from the host into frames of an arena on a CUDA device.

Copies are queued on the current stream, in front of the kernels that need them and behind those that read the frame's last
tenant. Experts in host memory, which is page-locked, are copied from there; the others pass through two page-locked staging
blocks. Packed ones are decoded on the device (`device_decode`). The logic is tested on a CPU; no GPU has run it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from sglmoe.memory.device_decode import Frames, PlainFrames
from sglmoe.memory.experts import Load
from sglmoe.memory.host_tier import HostTier, block_bytes, block_reader
from sglmoe.memory.store import CHUNK_BYTES, Bytes, ExpertStore
from sglmoe.units import show_bytes

NUM_STAGING = 2  # one is read into while the other is copied


class Event(Protocol):
    """A point in the stream, as `torch.cuda.Event`: one that was never recorded has been reached."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Stream(Protocol):
    """As `torch.cuda.Stream`."""

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


def page_lock(blocks: Bytes) -> None:
    """Lock memory where it is: no rounding to powers of two. Raises ValueError if CUDA refuses."""
    error = torch.cuda.cudart().cudaHostRegister(blocks.ctypes.data, blocks.nbytes, 0)
    if int(error) != 0:
        raise ValueError(
            f"CUDA can't page-lock {show_bytes(blocks.nbytes)} of host memory ({error}); lower --host-memory"
        )


class StreamCopier:
    """Copies for prefetches, one at a time, on a stream of their own. `arena` and `tier` as below.

    `compute` is the stream that reads the frames; `on_stream` makes its argument the thread's current one.
    """

    def __init__(
        self,
        arena: torch.Tensor,
        *,
        frame_bytes: int,
        store: ExpertStore,
        tier: HostTier,
        into: Frames | None = None,
        stream: Stream | None = None,
        compute: Stream | None = None,
        on_stream: Callable[[Any], AbstractContextManager[Any]] = torch.cuda.stream,
        lock_pages: Callable[[Bytes], None] = page_lock,
    ):
        self._into = into or PlainFrames(arena.view(-1, frame_bytes))
        self._store = store
        self._tier = tier
        self._blocks = torch.from_numpy(tier.blocks)
        self._block_bytes = block_bytes(store, as_stored=tier.as_stored)
        self._stream: Any = stream or torch.cuda.Stream()
        self._compute: Any = compute or torch.cuda.current_stream()
        self._on_stream = on_stream
        staging = np.empty(self._block_bytes, np.uint8)
        lock_pages(staging)
        self._staging = torch.from_numpy(staging)

    def copy(self, load: Load, before_chunk: Callable[[], None]) -> None:
        """Return when the expert is in its frame; a demand load waits for one chunk at most."""
        block = self._tier.pin(load.layer, load.expert)
        if block is None:
            read = block_reader(self._tier, self._store)
            num_bytes = read(
                load.layer, load.expert, self._staging.numpy(), before_chunk=before_chunk
            )
            self._tier.count_disk_read(load.layer, load.expert, num_bytes)
            self._copy(load, self._staging, before_chunk)
            return
        try:
            self._copy(load, self._blocks[block], before_chunk)
        finally:
            self._tier.unpin(block)

    def _copy(self, load: Load, source: torch.Tensor, before_chunk: Callable[[], None]) -> None:
        # What was queued up to now may read the frame's last tenant; what reads this one is queued later.
        self._stream.wait_stream(self._compute)
        target = self._into.place(load, self._block_bytes)
        try:
            for start in range(0, self._block_bytes, CHUNK_BYTES):
                before_chunk()
                with self._on_stream(self._stream):
                    part = source[start : start + CHUNK_BYTES]
                    target[start : start + CHUNK_BYTES].copy_(part, non_blocking=True)
                    if start + CHUNK_BYTES >= self._block_bytes:
                        self._into.flush()
                self._stream.synchronize()
        except BaseException:
            self._into.forget()
            raise


class DeviceCopier:
    """`arena` is uint8 ``[num_frames * frame_bytes]`` on the device; the tier's blocks are page-locked."""

    def __init__(
        self,
        arena: torch.Tensor,
        *,
        frame_bytes: int,
        store: ExpertStore,
        tier: HostTier,
        into: Frames | None = None,
        new_event: Callable[[], Event] = torch.cuda.Event,
        lock_pages: Callable[[Bytes], None] = page_lock,
    ):
        self._into = into or PlainFrames(arena.view(-1, frame_bytes))
        self._store = store
        self._tier = tier
        self._blocks = torch.from_numpy(tier.blocks)
        self._new_event = new_event
        self._copying: list[
            tuple[Event, list[int]]
        ] = []  # blocks to unpin once the event is reached
        self._block_bytes = block_bytes(store, as_stored=tier.as_stored)
        staging = np.empty((NUM_STAGING, self._block_bytes), np.uint8)
        if staging.nbytes:
            lock_pages(staging)
        self._staging = torch.from_numpy(staging)
        self._staging_free = [new_event() for _ in range(NUM_STAGING)]
        self._next_staging = 0

    def load(self, loads: Sequence[Load]) -> None:
        """Queue the copies; the frames may be used by whatever is queued on this stream after that.

        Returns before they are done. Raises ExpertReadError; then none of these frames may be used.
        """
        self._unpin_copied()
        pinned: list[int] = []
        try:
            for load in loads:
                self._queue(load, pinned)
        finally:
            self._into.flush()
            if pinned:
                copied = self._new_event()
                copied.record()
                self._copying.append((copied, pinned))

    def _queue(self, load: Load, pinned: list[int]) -> None:
        block = self._tier.pin(load.layer, load.expert)
        if block is None:
            self._stage(load)
        else:
            pinned.append(block)
            target = self._into.place(load, self._block_bytes)
            target.copy_(self._blocks[block], non_blocking=True)

    def _stage(self, load: Load) -> None:
        """Read into the staging block that was queued longer ago, once its copy is done."""
        index, self._next_staging = self._next_staging, (self._next_staging + 1) % NUM_STAGING
        block, free = self._staging[index], self._staging_free[index]
        free.synchronize()
        read = block_reader(self._tier, self._store)
        num_bytes = read(load.layer, load.expert, block.numpy())
        self._tier.count_disk_read(load.layer, load.expert, num_bytes)
        self._into.place(load, self._block_bytes).copy_(block, non_blocking=True)
        free.record()

    def _unpin_copied(self) -> None:
        while self._copying and self._copying[0][0].query():
            for block in self._copying.pop(0)[1]:
                self._tier.unpin(block)
