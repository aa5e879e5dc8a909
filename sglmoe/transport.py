"""Typed messages over ZeroMQ: one PUSH/PULL pair each way between two processes.

The sockets are unix sockets in a directory of mode 0700 that the scheduler makes. The scheduler binds and the worker connects.
Nothing but the unions of `protocol` is ever decoded.
"""

import asyncio
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import zmq

T = TypeVar("T")

# Numbers: as flags of an enumeration, each `&` takes a microsecond.
POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)
# Last words must leave before the socket closes; a peer that is gone must not hold us longer than this.
LINGER_MILLISECONDS = 2000


def make_socket_directory() -> Path:
    """A new directory that only this user can enter."""
    return Path(tempfile.mkdtemp(prefix="sglmoe-"))  # mkdtemp makes it 0700


def plans_address(directory: Path) -> str:
    return f"ipc://{directory}/plans"


def results_address(directory: Path) -> str:
    return f"ipc://{directory}/results"


class Sender(Generic[T]):
    """The PUSH end, from a thread that may block."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, *, bind: bool):
        self._socket = _open(context, zmq.PUSH, address, bind)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: T) -> None:
        self._socket.send(self._encoder.encode(message))

    def close(self) -> None:
        self._socket.close()


class Receiver(Generic[T]):
    """The PULL end, from a thread that may block."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        union: object,
        *,
        bind: bool,
    ):
        self._socket = _open(context, zmq.PULL, address, bind)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    def receive(self, timeout_seconds: float | None = None) -> T | None:
        """The next message, or None when `timeout_seconds` have passed without one."""
        if timeout_seconds is not None and not self._socket.poll(int(timeout_seconds * 1000)):
            return None
        return self._decoder.decode(self._socket.recv())

    def close(self) -> None:
        self._socket.close()


class AsyncSender(Generic[T]):
    """The PUSH end, in an event loop. What can't leave, because nobody is connected, waits here; the loop does not."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, *, bind: bool
    ) -> None:
        self._socket = _open(context, zmq.PUSH, address, bind)
        self._encoder = msgspec.msgpack.Encoder()
        self._waiting: deque[bytes] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._send_all)

    def send(self, message: T) -> None:
        self._waiting.append(self._encoder.encode(message))
        self._send_all()

    def _send_all(self) -> None:
        # The descriptor is readable until somebody has asked for the events, whatever they are.
        while self._socket.get(zmq.EVENTS) & POLLOUT and self._waiting:
            self._socket.send(self._waiting.popleft(), zmq.NOBLOCK)

    def close(self) -> None:
        self._loop.remove_reader(self._socket.FD)
        self._socket.close(linger=0)


class AsyncReceiver(Generic[T]):
    """The PULL end, in an event loop, which hands each message to `on_message`."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        union: object,
        on_message: Callable[[T], None],
        *,
        bind: bool,
    ) -> None:
        self._socket = _open(context, zmq.PULL, address, bind)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._receive_all)

    def _receive_all(self) -> None:
        while self._socket.get(zmq.EVENTS) & POLLIN:  # see AsyncSender
            self._on_message(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))

    def close(self) -> None:
        self._loop.remove_reader(self._socket.FD)
        self._socket.close(linger=0)


def _open(context, kind: int, address: str, bind: bool):  # type: ignore[no-untyped-def]
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, LINGER_MILLISECONDS)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    if bind:
        socket.bind(address)
    else:
        socket.connect(address)
    return socket
