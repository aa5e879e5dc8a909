"""What loading and decoding an expert take on a device: measured by events on the stream that does it, never waited for.

The logic is tested on a CPU; no GPU has run it.
"""

from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from sglmoe.memory.decode_ratio import DecodeRatio
from sglmoe.memory.device_decode import DecodedFrames
from sglmoe.memory.experts import Load, PackedCell
from sglmoe.memory.store import ExpertStore


class Timer(Protocol):
    """As `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any) -> float: ...


def new_timer() -> Timer:
    timer: Timer = torch.cuda.Event(enable_timing=True)
    return timer


class Span(NamedTuple):
    """What the stream does between two events: it brings so many experts into their frames."""

    start: Timer
    end: Timer
    num_experts: int
    is_decoded: bool  # from the arena


class LoadTimer:
    """Tells `ratio` what experts took, once the device has got there."""

    def __init__(self, ratio: DecodeRatio, new_timer: Callable[[], Timer] = new_timer):
        self._ratio = ratio
        self._new_timer = new_timer
        self._spans: deque[Span] = deque()  # the oldest first

    @contextmanager
    def span(self, num_experts: int, *, is_decoded: bool) -> Generator[None, None, None]:
        """What is queued inside brings so many experts, or fails."""
        if not num_experts:
            yield
            return
        span = Span(self._new_timer(), self._new_timer(), num_experts, is_decoded)
        span.start.record()
        yield
        span.end.record()
        self._spans.append(span)

    def collect(self) -> None:
        """Note what has been done by now."""
        while self._spans and self._spans[0].end.query():
            start, end, num_experts, is_decoded = self._spans.popleft()
            seconds = start.elapsed_time(end) / 1000
            self._ratio.note(seconds / num_experts, is_decoded=is_decoded)


def device_decoding_seconds(
    frames: DecodedFrames, store: ExpertStore, new_timer: Callable[[], Timer] = new_timer
) -> float:
    """What decoding an expert from the arena takes: the least of three times, on the current stream.

    While frames have no tenants: frames 0 and 1 are written to. Waits for the device.
    """
    layer, expert = store.experts()[0]
    last = store.stored_parts(layer, expert)[-1]
    stored = np.empty(last.stored_offset + last.stored_bytes, np.uint8)
    store.read_stored(layer, expert, stored)
    runs = ((0, stored.nbytes),)
    frames.place(Load(1, layer, expert, PackedCell(runs, is_filled=False)), stored.nbytes).copy_(
        torch.from_numpy(stored)
    )
    frames.flush()  # compiles the kernel

    def decode() -> None:
        frames.unpack(Load(1, layer, expert, PackedCell(runs, is_filled=True)))
        frames.flush()

    return least_seconds(decode, new_timer)


def device_copy_seconds(
    frame: torch.Tensor, block: torch.Tensor, new_timer: Callable[[], Timer] = new_timer
) -> float:
    """What copying a block of host memory, page-locked, to the start of a frame takes: likewise.

    Both uint8; the frame must have no tenant.
    """

    def copy() -> None:
        frame[: len(block)].copy_(block, non_blocking=True)

    copy()  # the first may find the device asleep
    return least_seconds(copy, new_timer)


def least_seconds(queue: Callable[[], object], new_timer: Callable[[], Timer]) -> float:
    """The least of three times that what is queued takes on the current stream. Waits for the device."""
    seconds = []
    for _ in range(3):
        start, end = new_timer(), new_timer()
        start.record()
        queue()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return min(seconds)
