"""The HTTP server's end of the line to the scheduler: one answer for all who look at about the same time."""

import asyncio
from collections.abc import Awaitable, Callable
from socket import socket

# Arbitrary: how old an answer may be, and how long one may take.
SHARED_SECONDS = 0.25
LONGEST_SECONDS = 5.0
# A map of a million frames has so many.
LONGEST_BYTES = 1 << 24


class Feed:
    """Asks `ask` when somebody asks it, one question at a time."""

    def __init__(self, ask: Callable[[], Awaitable[bytes]], *, clock: Callable[[], float]) -> None:
        self._ask = ask
        self._clock = clock
        self._answer: asyncio.Task[bytes] | None = None
        self._answered_at = 0.0

    async def latest(self) -> bytes:
        """An answer that is no older than `SHARED_SECONDS`. Raises OSError where none comes."""
        if self._answer is None or self._is_old(self._answer):
            self._answer = asyncio.create_task(self._fetch())
        # Whoever leaves while it is under way does not take it from the others, nor leaves a line behind that is
        # the answer to somebody else's question.
        return await asyncio.wait_for(asyncio.shield(self._answer), LONGEST_SECONDS)

    def _is_old(self, answer: asyncio.Task[bytes]) -> bool:
        if not answer.done():
            return False
        age = self._clock() - self._answered_at
        return answer.exception() is not None or age >= SHARED_SECONDS

    async def _fetch(self) -> bytes:
        answer = await self._ask()
        self._answered_at = self._clock()
        return answer


class Line:
    """Sends an empty line, gets a line."""

    def __init__(self, scheduler: socket) -> None:
        self._scheduler = scheduler
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self) -> bytes:
        """A `LiveState` as JSON. Raises ConnectionError where the scheduler is gone."""
        if self._streams is None:
            # Not before there is an event loop.
            self._streams = await asyncio.open_unix_connection(
                sock=self._scheduler, limit=LONGEST_BYTES
            )
        reader, writer = self._streams
        writer.write(b"\n")
        answer = await reader.readline()
        if not answer.endswith(b"\n"):
            writer.close()
            raise ConnectionError("the scheduler is gone")
        return answer
