"""Typed messages over ZeroMQ: one PUSH/PULL pair each way between two processes.

The sockets are unix sockets in a directory of mode 0700 that the scheduler makes. The scheduler binds and the worker connects.
Nothing but the unions of `protocol` is ever decoded.
"""

import tempfile
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

T = TypeVar("T")

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
    """The PUSH end, in an event loop. A connected peer that does not read makes the queue grow, not the loop stop."""

    def __init__(self, context: zmq.asyncio.Context, address: str, *, bind: bool):
        self._socket = _open(context, zmq.PUSH, address, bind)
        self._encoder = msgspec.msgpack.Encoder()

    async def send(self, message: T) -> None:
        await self._socket.send(self._encoder.encode(message))

    def close(self) -> None:
        self._socket.close(linger=0)


class AsyncReceiver(Generic[T]):
    """The PULL end, in an event loop."""

    def __init__(self, context: zmq.asyncio.Context, address: str, union: object, *, bind: bool):
        self._socket = _open(context, zmq.PULL, address, bind)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    async def receive(self) -> T:
        return self._decoder.decode(await self._socket.recv())

    def close(self) -> None:
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
