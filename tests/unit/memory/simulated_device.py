"""A device whose streams do their work late, in any order that events allow, and that finds races.

Copies and kernels are queued and done later, one at a time, on whichever stream is drawn; so who reads too early reads the
wrong bytes. Besides, each access to memory gets a vector clock: two accesses to the same bytes, one of them a write, of which
neither happens before the other, are a race, even if this run came to no harm.

Stands in for torch.cuda. Streams, events and host threads are the actors. What CUDA promises and this assumes: work of one
stream is done in order; work that is queued happens after what its thread has done before; a stream that waits for an event
goes on after the work in front of the event's last record; `synchronize`, and a `query` that says yes, tell the host of it.
"""

from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import torch
from taken_turns import TakenTurns, Times, join


class Range(msgspec.Struct, frozen=True):
    """Bytes of memory, by their addresses."""

    start: int
    stop: int

    def overlaps(self, other: "Range") -> bool:
        return self.start < other.stop and other.start < self.stop


def bytes_of(array: torch.Tensor | np.ndarray) -> Range:
    if isinstance(array, np.ndarray):
        return Range(array.ctypes.data, array.ctypes.data + array.nbytes)
    return Range(array.data_ptr(), array.data_ptr() + array.nbytes)


class Access(msgspec.Struct, frozen=True):
    what: str
    where: Range
    is_write: bool
    actor: str
    time: int
    times: Times


class Work:
    """Something that a stream will do, and what happens before it."""

    def __init__(self, do: Callable[[], object], is_ready: Callable[[], bool] = lambda: True):
        self.do = do
        self.is_ready = is_ready


class Device:
    """`Stream()` and `Event()` are those of torch.cuda; `tensor` makes memory whose `copy_` is queued."""

    def __init__(
        self,
        turns: TakenTurns,
        draw: Callable[[int], int],
        make_stream: type["Stream"] | None = None,
        make_event: type["Event"] | None = None,
    ):
        """`draw(n)`: a number below n. Streams and events may be of kinds that have a fault."""
        self.turns = turns
        self.races: list[str] = []
        self._draw = draw
        self._make_stream, self._make_event = make_stream or Stream, make_event or Event
        self._streams: list[Stream] = []
        self._accesses: list[Access] = []
        self._page_locked: list[Range] = []
        self.default = self.Stream("compute")
        self._current: dict[str, Stream] = {}  # by host thread

    def Stream(self, name: str) -> "Stream":
        stream = self._make_stream(self, name)
        self._streams.append(stream)
        return stream

    def Event(self) -> "Event":
        return self._make_event(self)

    def current_stream(self) -> "Stream":
        return self._current.get(self.turns.current.name, self.default)

    @contextmanager
    def on_stream(self, stream: "Stream") -> Generator[None, None, None]:
        before = self.current_stream()
        self._current[self.turns.current.name] = stream
        try:
            yield
        finally:
            self._current[self.turns.current.name] = before

    def tensor(self, memory: torch.Tensor) -> torch.Tensor:
        """The same memory, and all views of it, as the device's."""
        device = self

        class DeviceTensor(torch.Tensor):
            @classmethod
            def __torch_function__(
                cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                if function == torch.Tensor.copy_:
                    is_there = isinstance(args[1], DeviceTensor)
                    target, source = (its.as_subclass(torch.Tensor) for its in args[:2])
                    device.copy(target, source, is_there=is_there)
                    return args[0]
                return super().__torch_function__(function, types, args, kwargs or {})

        return memory.as_subclass(DeviceTensor)

    def lock_pages(self, array: np.ndarray) -> None:
        self._page_locked.append(bytes_of(array))

    def copy(self, target: torch.Tensor, source: torch.Tensor, *, is_there: bool) -> None:
        """Queue a copy from the host, or of what is on the device, on the current stream of the thread."""
        where = bytes_of(source)
        if not is_there and not any(
            its.start <= where.start and where.stop <= its.stop for its in self._page_locked
        ):
            self.races.append("a copy from memory that is not page-locked: CUDA waits for it")
        what = "copy on the device" if is_there else "copy"
        stream = self.current_stream()
        stream.queue(what, lambda: target.copy_(source), reads=[where], writes=[bytes_of(target)])

    def host_writes(self, array: np.ndarray) -> None:
        """The current thread is about to write here."""
        thread = self.turns.current
        self.note("host write", thread.name, thread.times, writes=[bytes_of(array)])
        thread.times[thread.name] += 1

    def note(
        self,
        what: str,
        actor: str,
        times: Times,
        *,
        reads: list[Range] | None = None,
        writes: list[Range] | None = None,
    ) -> None:
        """Compare with all that has been queued or done before; what is told late may have happened before some of it."""
        for where, is_write in [(its, False) for its in reads or []] + [
            (its, True) for its in writes or []
        ]:
            for before in self._accesses:
                if not (is_write or before.is_write) or not where.overlaps(before.where):
                    continue
                is_first = before.times.get(actor, 0) >= times[actor]
                if times.get(before.actor, 0) < before.time and not is_first:
                    self.races.append(
                        f"{what} on {actor} races with {before.what} on {before.actor}"
                    )
            self._accesses.append(Access(what, where, is_write, actor, times[actor], dict(times)))

    def work_some(self) -> None:
        """Do as much of what is queued as is drawn."""
        while not self._draw(3) and self._work():
            pass

    def work_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            assert self._work(), "streams wait for each other"

    def finish(self) -> None:
        """Do all that is queued."""
        self.work_until(lambda: not any(its.works for its in self._streams))

    def _work(self) -> bool:
        ready = [its for its in self._streams if its.works and its.works[0].is_ready()]
        if ready:
            ready[self._draw(len(ready))].works.popleft().do()
        return bool(ready)


class Stream:
    def __init__(self, device: Device, name: str):
        self.name = name
        self.works: deque[Work] = deque()
        self.times: Times = {name: 0}
        self._device = device

    def queue(
        self,
        what: str,
        do: Callable[[], object],
        *,
        reads: list[Range] | None = None,
        writes: list[Range] | None = None,
    ) -> None:
        """Work that touches memory."""
        self._device.turns.give(self.times)
        self.times[self.name] += 1
        self._device.note(what, self.name, self.times, reads=reads, writes=writes)
        self.works.append(Work(do))
        self._device.work_some()
        self._device.turns.turn()

    def queue_deciding(self, do: Callable[[Times], object]) -> None:
        """Work that decides itself, when it is done, what it touches: it notes that with the times that it is given."""
        self._device.turns.give(self.times)
        self.times[self.name] += 1
        times = dict(self.times)
        self.works.append(Work(lambda: do(times)))
        self._device.work_some()
        self._device.turns.turn()

    def wait_event(self, event: "Event") -> None:
        recorded = event.recorded
        if recorded is not None:
            join(self.times, recorded.times)
            self.works.append(Work(lambda: None, lambda: recorded.is_reached))

    def wait_stream(self, stream: "Stream") -> None:
        event = Event(self._device)
        event.record(stream)
        self.wait_event(event)

    def synchronize(self) -> None:
        event = Event(self._device)
        event.record(self)
        event.synchronize()


class Recorded:
    """A place in a stream."""

    def __init__(self, times: Times):
        self.times = dict(times)
        self.is_reached = False

    def reach(self) -> None:
        self.is_reached = True


class Event:
    def __init__(self, device: Device):
        self._device = device
        self.recorded: Recorded | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._device.current_stream()
        self._device.turns.give(stream.times)
        self.recorded = Recorded(stream.times)
        stream.works.append(Work(self.recorded.reach))

    def query(self) -> bool:
        self._device.work_some()
        if self.recorded is not None and not self.recorded.is_reached:
            return False
        self._tell_host()
        return True

    def elapsed_time(self, end: "Event") -> float:
        """As if each took as long as the other. CUDA refuses where one has not been reached."""
        for event in (self, end):
            assert event.recorded is not None
            assert event.recorded.is_reached, "the time of what has not been done yet"
        return 1.0

    def synchronize(self) -> None:
        recorded = self.recorded
        if recorded is not None:
            self._device.work_until(lambda: recorded.is_reached)
        self._tell_host()
        self._device.turns.turn()

    def _tell_host(self) -> None:
        if self.recorded is not None:
            self._device.turns.take(self.recorded.times)
