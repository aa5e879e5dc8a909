"""A link that moves experts in virtual time: on demand, and in the background.

It stands where the copier and the background loader stand in a server. Time passes while the caller
computes, and while it waits: for a demand load, for a background load that is needed now, and for
the end of a chunk that a cancelled one is writing.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from sglmoe.memory.experts import Load
from sglmoe.memory.prefetch import Arrival


class LinkSpeed(msgspec.Struct, frozen=True):
    """A transfer is one background load, or a group of demand loads."""

    bytes_per_second: float
    latency_seconds: float  # of each transfer, before its first byte; nothing else moves meanwhile
    chunk_bytes: int  # what a demand load can't interrupt

    def seconds(self, num_bytes: int) -> float:
        """For a transfer that has the link to itself."""
        return self.latency_seconds + num_bytes / self.bytes_per_second


@dataclass(slots=True)
class _Transfer:
    """A background load that has had the link for so long."""

    load: Load
    seconds: float = 0.0


class SimulatedLink:
    """Demand waits for the rest of one chunk at most, and while it moves nothing else does.

    A background load that was interrupted goes on where it was, without another latency.
    """

    def __init__(self, speed: LinkSpeed, *, expert_bytes: int):
        self._speed = speed
        self._expert_bytes = expert_bytes
        self._expert_seconds = speed.seconds(expert_bytes)
        self._chunk_seconds = speed.chunk_bytes / speed.bytes_per_second
        self._queue: deque[_Transfer] = deque()  # only the first may have begun
        self._ended: list[Load] = []
        self._promoted: set[Load] = set()
        self.now = 0.0  # seconds: this and the following are totals since the start
        self.compute_seconds = 0.0
        self.busy_seconds = 0.0  # that the link was at work
        self.delay_seconds = 0.0  # that the caller waited for chunks of what it did not need
        self.num_begun = 0
        self.num_demanded = 0
        self._background_bytes = 0.0

    @property
    def bytes_moved(self) -> int:
        """Those of loads that were cancelled on their way, too."""
        return self.num_demanded * self._expert_bytes + round(self._background_bytes)

    @property
    def stall_seconds(self) -> float:
        """That the caller waited, for whatever it was."""
        return self.now - self.compute_seconds

    @property
    def num_queued(self) -> int:
        """Background loads that have not ended."""
        return len(self._queue)

    def on_their_way(self) -> list[Load]:
        """Background loads whose end has not been told yet."""
        return [*self._ended, *(its.load for its in self._queue)]

    def compute(self, seconds: float) -> None:
        """The caller is busy, so the background has the link."""
        left = seconds
        while self._queue and left > 0:
            left -= self._advance(left)
        self.now += seconds
        self.compute_seconds += seconds

    def load(self, loads: Sequence[Load]) -> None:
        """Demand loads, one transfer."""
        self._finish_chunk()
        seconds = self._speed.seconds(len(loads) * self._expert_bytes)
        self.now += seconds
        self.busy_seconds += seconds
        self.num_demanded += len(loads)

    # ------------------------------------------------------------------------ as BackgroundLoader

    def begin(self, load: Load) -> None:
        self._queue.append(_Transfer(load))
        self.num_begun += 1

    def finished(self) -> list[Arrival]:
        told = [load for load in self._ended if load not in self._promoted]
        self._ended = [load for load in self._ended if load in self._promoted]
        return [Arrival(load, is_there=True) for load in told]

    def promote(self, load: Load) -> None:
        self._promoted.add(load)

    def wait(self, load: Load) -> bool:
        self._promoted.remove(load)
        if not self._drop_ended(load):
            self._bring_to_front(self._find(load))
            self.now += self._advance(math.inf)
            self._ended.remove(load)
        return True

    def cancel(self, load: Load) -> None:
        if self._drop_ended(load):
            return
        transfer = self._find(load)
        if transfer is self._queue[0]:
            self._finish_chunk()
        if not self._drop_ended(load):
            self._queue.remove(transfer)

    # -------------------------------------------------------------------------------------- inside

    def _find(self, load: Load) -> _Transfer:
        return next(its for its in self._queue if its.load == load)

    def _drop_ended(self, load: Load) -> bool:
        """Whether it had ended; then it is not reported any more."""
        if load not in self._ended:
            return False
        self._ended.remove(load)
        return True

    def _bring_to_front(self, transfer: _Transfer) -> None:
        if transfer is not self._queue[0]:
            self._finish_chunk()
            self._queue.remove(transfer)
            self._queue.appendleft(transfer)

    def _finish_chunk(self) -> None:
        """Wait for the rest of the chunk that is moving, if any is."""
        if not self._queue:
            return
        within = self._queue[0].seconds - self._speed.latency_seconds
        num_chunks = within / self._chunk_seconds
        # A boundary that was reached is not missed for rounding.
        rest = (math.ceil(num_chunks - 1e-9) - num_chunks) * self._chunk_seconds
        if within > 0 and rest > 0:
            waited = self._advance(rest)
            self.now += waited
            self.delay_seconds += waited

    def _advance(self, most_seconds: float) -> float:
        """The first in the queue has the link for so long, or until it ends; how long it had it."""
        transfer = self._queue[0]
        before, left = transfer.seconds, self._expert_seconds - transfer.seconds
        if left <= most_seconds:
            transfer.seconds = self._expert_seconds
            self._ended.append(self._queue.popleft().load)
        else:
            transfer.seconds += most_seconds
        used = min(left, most_seconds)
        self.busy_seconds += used
        self._background_bytes += self._bytes_in(transfer.seconds) - self._bytes_in(before)
        return used

    def _bytes_in(self, seconds: float) -> float:
        """That a background load has moved after so long."""
        return max(0.0, seconds - self._speed.latency_seconds) * self._speed.bytes_per_second
