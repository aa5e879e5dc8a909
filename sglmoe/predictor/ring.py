"""A ring of messages in memory that two processes share: one sends, the other receives, and no lock is held.

The memory: two POSIX semaphores, a table of NUM_PLACES places (start and size of a message, int64), then the messages'
bytes. The n-th message is at place n % NUM_PLACES. `sent` is posted when it can be read, `read` when its bytes may be
written over: what a side has done before it posts, the other sees after it has taken (POSIX.1-2017, 4.12), on any
processor. Nothing else is shared: each side counts for itself. A post is a system call only if the other side sleeps.
"""

import ctypes
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from sglmoe.nameless_memory import NamelessMemory

T = TypeVar("T")

# Arbitrary: more messages than this never wait, however small.
NUM_PLACES = 128

# A cache line each, since both sides write to them; glibc's sem_t has 32 bytes.
_SENT, _READ, _PLACES = 0, 64, 128
_BYTES = _PLACES + NUM_PLACES * 2 * 8

_libc = ctypes.CDLL(None)  # gives the GIL away, for what may wait
_libc_at_once = ctypes.PyDLL(None)
for _function in (_libc.sem_wait, _libc_at_once.sem_trywait, _libc_at_once.sem_post):
    _function.argtypes = [ctypes.c_void_p]
_libc.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]


class _Semaphore:
    """One that lies at an address of shared memory, and is 0 at first."""

    def __init__(self, address: int):
        self._address = ctypes.c_void_p(address)
        self._post: Callable[[ctypes.c_void_p], int] = _libc_at_once.sem_post
        self._try: Callable[[ctypes.c_void_p], int] = _libc_at_once.sem_trywait

    def initialise(self) -> None:
        """To be done once, by one of the processes."""
        is_shared, value = 1, 0
        _libc.sem_init(self._address, is_shared, value)

    def post(self) -> None:
        self._post(self._address)

    def take_now(self) -> bool:
        return self._try(self._address) == 0

    def take(self) -> None:
        """Wait for it; Python's signal handlers run meanwhile."""
        while _libc.sem_wait(self._address):
            pass


class Ring:
    """The memory, with room for `num_bytes` of messages. May be handed to a process that is being started."""

    def __init__(self, num_bytes: int):
        self._look_at(NamelessMemory(_BYTES + num_bytes))
        self.sent.initialise()
        self.read.initialise()

    def _look_at(self, memory: NamelessMemory) -> None:
        self._memory = memory
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory.bytes))
        self.sent, self.read = _Semaphore(address + _SENT), _Semaphore(address + _READ)
        self.places = memory.bytes[_PLACES:_BYTES].cast("q")
        self.bytes = memory.bytes[_BYTES:]

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self._memory,)


def _received(memory: NamelessMemory) -> Ring:
    """In the other process."""
    ring = Ring.__new__(Ring)
    ring._look_at(memory)
    return ring


class RingSender(Generic[T]):
    """The end that never waits."""

    def __init__(self, ring: Ring):
        self._ring = ring
        self._encoder = msgspec.msgpack.Encoder()
        self._unread: deque[tuple[int, int]] = deque()  # start and end, the oldest first
        self._num_sent = 0

    def try_send(self, message: T) -> bool:
        """False if there is no room for it."""
        ring, unread = self._ring, self._unread
        data = self._encoder.encode(message)
        num_bytes = len(data)
        while unread and ring.read.take_now():
            unread.popleft()
        start = self._room_for(num_bytes)
        if start is None:
            return False
        ring.bytes[start : start + num_bytes] = data
        place = 2 * (self._num_sent % NUM_PLACES)
        ring.places[place], ring.places[place + 1] = start, num_bytes
        unread.append((start, start + num_bytes))
        self._num_sent += 1
        ring.sent.post()
        return True

    def _room_for(self, num_bytes: int) -> int | None:
        """Behind the latest message, or before the oldest one; at the start if there is none: that is in the cache."""
        unread, size = self._unread, len(self._ring.bytes)
        if not unread:
            return 0 if num_bytes <= size else None
        if len(unread) == NUM_PLACES:
            return None
        first, (latest, end) = unread[0][0], unread[-1]
        if latest < first:
            return end if num_bytes <= first - end else None
        if num_bytes <= size - end:
            return end
        return 0 if num_bytes <= first else None


class RingReceiver(Generic[T]):
    """The end that takes messages of a `union`, in order."""

    def __init__(self, ring: Ring, union: object):
        self._ring = ring
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)
        self._num_received = 0

    def receive(self, *, num_looks: int = 0, look_seconds: float = 0.0) -> T:
        """Wait for the next one: look for it so many times, and so long apart, then sleep until it is sent.

        To wake somebody takes the sender 8 to 13 us (two cores of a virtual machine), otherwise it takes 1.
        """
        for _ in range(num_looks):
            if self._ring.sent.take_now():
                return self._decoded()
            time.sleep(look_seconds)
        self._ring.sent.take()
        return self._decoded()

    def receive_now(self) -> T | None:
        """The next one if it is there."""
        return self._decoded() if self._ring.sent.take_now() else None

    def _decoded(self) -> T:
        ring = self._ring
        place = 2 * (self._num_received % NUM_PLACES)
        start, num_bytes = ring.places[place], ring.places[place + 1]
        message = self._decoder.decode(ring.bytes[start : start + num_bytes])
        self._num_received += 1
        ring.read.post()
        return message
