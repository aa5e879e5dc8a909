"""Moves experts' bytes from the host into frames of an arena on a CUDA device.

Three streams: what computes, what a layer waits for (demand), what comes ahead of its layer (prefetch). A copy waits on the
device for whatever had been queued when it got its frame, for that may still read the last tenant; what reads the newcomer
waits for the copy. Experts in host memory, which is page-locked, are copied from there; others pass through page-locked
staging blocks, each of exactly one expert. Packed ones are decoded on the device (`device_decode`). Nothing here waits for
the whole device. Tested on streams that are simulated (tests/unit/memory/test_device_protocol.py); no GPU has run it.
"""

import queue
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch

from sglmoe.errors import budgets
from sglmoe.memory.device_decode import Frames, PlainFrames
from sglmoe.memory.experts import Load
from sglmoe.memory.host_tier import HostTier, block_bytes, block_reader, page_locked
from sglmoe.memory.link_gate import Finish
from sglmoe.memory.load_timer import LoadTimer
from sglmoe.memory.store import CHUNK_BYTES, Bytes, ExpertStore

NUM_STAGING = 2  # one is read into while the other is copied, or by another thread


class Event(Protocol):
    """A point in the current stream, as `torch.cuda.Event`: one that was never recorded has been reached."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Stream(Protocol):
    """As `torch.cuda.Stream`."""

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


OnStream = Callable[[Any], AbstractContextManager[Any]]


# Kept for as long as the process runs. CUDA would take whatever else came to lie there for locked, and copy from the pages that
# were there before.
_locked: list[Bytes] = []


def page_lock(blocks: Bytes) -> None:
    """Lock memory where it is, for good: no rounding to powers of two. Raises ValueError if CUDA refuses."""
    error = torch.cuda.cudart().cudaHostRegister(blocks.ctypes.data, blocks.nbytes, 0)
    if int(error) != 0:
        raise budgets.page_lock_refused(host_bytes=blocks.nbytes, why=str(error))
    _locked.append(blocks)


class Lane(NamedTuple):
    """What one copy at a time needs."""

    staging: torch.Tensor  # page-locked, uint8 [block_bytes]
    into: Frames


class StreamCopier:
    """Copies for prefetches, one at a time, on a stream of their own. `arena` and `tier` as below.

    Loads are begun where the stream is current that reads the frames; `on_stream` makes its argument the current one. Two
    threads may copy at a time: the one that prefetches, held up between two chunks, and the one that needs another expert
    now; for each `new_into` is called once.
    """

    def __init__(
        self,
        arena: torch.Tensor,
        *,
        frame_bytes: int,
        store: ExpertStore,
        tier: HostTier,
        new_into: Callable[[], Frames] | None = None,
        stream: Stream | None = None,
        on_stream: OnStream = torch.cuda.stream,
        new_event: Callable[[], Event] = torch.cuda.Event,
        lock_pages: Callable[[Bytes], None] = page_lock,
    ):
        self._store = store
        self._tier = tier
        self._blocks = torch.from_numpy(tier.blocks)
        self._block_bytes = block_bytes(store, as_stored=tier.as_stored)
        self._stream: Any = stream or torch.cuda.Stream()
        self._on_stream = on_stream
        self._new_event = new_event
        frames = arena.view(-1, frame_bytes)
        self._lanes: queue.SimpleQueue[Lane] = queue.SimpleQueue()  # those not in use
        for block in page_locked(NUM_STAGING, self._block_bytes, lock_pages):
            into = new_into() if new_into is not None else PlainFrames(frames)
            self._lanes.put(Lane(torch.from_numpy(block), into))

    def mark(self) -> Event:
        """What may read the last tenant of a frame that is given away now was queued before this.

        Copies wait for no more: the next layer's experts come while what this one queues from here on runs.
        """
        event = self._new_event()
        event.record()
        return event

    def copy(self, load: Load, mark: Event, before_chunk: Callable[[], None]) -> None:
        """Return when the expert is in its frame; a demand load waits for one chunk at most."""
        lane = self._lanes.get_nowait()
        try:
            self._copy_by(lane, load, mark, before_chunk)
        finally:
            self._lanes.put(lane)

    def _copy_by(
        self, lane: Lane, load: Load, mark: Event, before_chunk: Callable[[], None]
    ) -> None:
        self._stream.wait_event(mark)
        block = self._tier.pin(load.layer, load.expert)
        if block is None:
            read = block_reader(self._tier, self._store)
            staging = lane.staging.numpy()
            num_bytes = read(load.layer, load.expert, staging, before_chunk=before_chunk)
            self._tier.count_disk_read(load.layer, load.expert, num_bytes)
            self._move(load, lane.staging, lane.into, before_chunk)
            return
        try:
            self._move(load, self._blocks[block], lane.into, before_chunk)
        finally:
            self._tier.unpin(block)

    def _move(
        self, load: Load, source: torch.Tensor, into: Frames, before_chunk: Callable[[], None]
    ) -> None:
        target = into.place(load, self._block_bytes)
        try:
            for start in range(0, self._block_bytes, CHUNK_BYTES):
                before_chunk()
                with self._on_stream(self._stream):
                    part = source[start : start + CHUNK_BYTES]
                    target[start : start + CHUNK_BYTES].copy_(part, non_blocking=True)
                    if start + CHUNK_BYTES >= self._block_bytes:
                        into.flush()
                self._stream.synchronize()
        except BaseException:
            into.forget()
            raise


class DeviceCopier:
    """Copies for layers that wait, on a stream of their own: residents compute meanwhile.

    `arena` is uint8 ``[num_frames * frame_bytes]`` on the device; the tier's blocks are page-locked. `compute` and
    `on_stream` as above. `timer` is told what loads take.
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
        on_stream: OnStream = torch.cuda.stream,
        new_event: Callable[[], Event] = torch.cuda.Event,
        lock_pages: Callable[[Bytes], None] = page_lock,
        timer: LoadTimer | None = None,
    ):
        self._timer = timer
        self._into = into or PlainFrames(arena.view(-1, frame_bytes))
        self._store = store
        self._tier = tier
        self._blocks = torch.from_numpy(tier.blocks)
        self._stream: Any = stream or torch.cuda.Stream()
        self._compute: Any = compute or torch.cuda.current_stream()
        self._on_stream = on_stream
        self._new_event = new_event
        self._copying: list[
            tuple[Event, list[int]]
        ] = []  # blocks to unpin once the event is reached
        self._block_bytes = block_bytes(store, as_stored=tier.as_stored)
        self._staging = torch.from_numpy(page_locked(NUM_STAGING, self._block_bytes, lock_pages))
        self._staging_free = [new_event() for _ in range(NUM_STAGING)]
        self._next_staging = 0

    def load(self, loads: Sequence[Load]) -> Finish:
        """Queue the copies. What this returns makes the compute stream wait for them; the host waits in neither.

        Raises ExpertReadError; then none of these frames may be used.
        """
        self._unpin_copied()
        # What was queued up to now may read the frames' last tenants.
        self._stream.wait_stream(self._compute)
        copied = self._new_event()
        pinned: list[int] = []
        try:
            with self._on_stream(self._stream):
                try:
                    self._queue_all(loads, pinned)
                finally:
                    self._into.flush()
                    copied.record()
                    self._copying.append((copied, pinned))
        except BaseException:
            # Copies that were queued are still to come: whoever gets these frames comes after them.
            self._compute.wait_event(copied)
            raise
        return lambda: self._wait_for(copied)

    def _wait_for(self, copied: Event) -> float:
        """Nothing that is queued from now on runs before; how long that takes the host does not see."""
        self._compute.wait_event(copied)
        return 0.0

    def _queue_all(self, loads: Sequence[Load], pinned: list[int]) -> None:
        """Those from below first, then those that are packed in the arena."""
        packed = [load for load in loads if load.is_packed]
        with self._span(len(loads) - len(packed), is_decoded=False):
            for load in loads:
                if not load.is_packed:
                    self._queue(load, pinned)
            self._into.flush()
        with self._span(len(packed), is_decoded=True):
            for load in packed:
                self._into.unpack(load)
            self._into.flush()

    def _span(self, num_experts: int, *, is_decoded: bool) -> AbstractContextManager[None]:
        if self._timer is None:
            return nullcontext()
        return self._timer.span(num_experts, is_decoded=is_decoded)

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
        if self._timer is not None:
            self._timer.collect()
        while self._copying and self._copying[0][0].query():
            for block in self._copying.pop(0)[1]:
                self._tier.unpin(block)
