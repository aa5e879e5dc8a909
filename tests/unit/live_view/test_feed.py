"""One answer for all who look; nobody who leaves takes it from the others."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from sglmoe.live_view import feed as feed_module
from sglmoe.live_view.feed import Feed, Line


class Scheduler:
    """Counts questions; answers when it is let."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.now = 0.0
        self.gate = asyncio.Event()
        self.gate.set()
        self.fails = False
        self.feed = Feed(self.ask, clock=lambda: self.now)

    async def ask(self) -> bytes:
        self.num_asked += 1
        await self.gate.wait()
        if self.fails:
            raise ConnectionError("gone")
        return b"%d" % self.num_asked


def play(scene: Callable[[Scheduler], Awaitable[None]]) -> None:
    async def run() -> None:
        await scene(Scheduler())

    asyncio.run(run())


def test_those_who_look_at_the_same_time_share_an_answer() -> None:
    async def scene(scheduler: Scheduler) -> None:
        scheduler.gate.clear()
        looking = [asyncio.create_task(scheduler.feed.latest()) for _ in range(3)]
        await asyncio.sleep(0)
        scheduler.gate.set()
        assert await asyncio.gather(*looking) == [b"1", b"1", b"1"]
        scheduler.now = 0.24
        assert await scheduler.feed.latest() == b"1"
        scheduler.now = 0.25
        assert await scheduler.feed.latest() == b"2"

    play(scene)


def test_nobody_looks_nobody_is_asked() -> None:
    async def scene(scheduler: Scheduler) -> None:
        await scheduler.feed.latest()
        scheduler.now = 1000
        await asyncio.sleep(0.01)
        assert scheduler.num_asked == 1

    play(scene)


def test_whoever_leaves_does_not_end_the_question() -> None:
    async def scene(scheduler: Scheduler) -> None:
        scheduler.gate.clear()
        leaving = asyncio.create_task(scheduler.feed.latest())
        staying = asyncio.create_task(scheduler.feed.latest())
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.sleep(0)
        scheduler.gate.set()
        assert await staying == b"1"

    play(scene)


def test_after_a_failure_it_is_asked_again() -> None:
    async def scene(scheduler: Scheduler) -> None:
        scheduler.fails = True
        with pytest.raises(ConnectionError):
            await scheduler.feed.latest()
        scheduler.fails = False
        assert await scheduler.feed.latest() == b"2"

    play(scene)


def test_no_answer_is_an_error_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "LONGEST_SECONDS", 0.01)

    async def scene(scheduler: Scheduler) -> None:
        scheduler.gate.clear()
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await scheduler.feed.latest()
        assert scheduler.num_asked == 1, "its answer would be taken for that to the next question"

    play(scene)


def test_a_line_for_a_line_even_a_long_one_and_an_error_at_the_end() -> None:
    long = b"x" * 2_000_000 + b"\n"

    async def run() -> None:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=theirs)
        line = Line(ours)
        for answer in (b"first\n", long):
            asking = asyncio.create_task(line.ask())
            assert await reader.readline() == b"\n"
            writer.write(answer)
            assert await asking == answer
        asking = asyncio.create_task(line.ask())
        assert await reader.readline() == b"\n"
        writer.close()
        with pytest.raises(ConnectionError, match="the scheduler is gone"):
            await asking
        await asyncio.sleep(0)
        assert ours.fileno() == -1  # closed
        with pytest.raises(ConnectionError, match="the scheduler is gone"):
            await line.ask()

    asyncio.run(run())
