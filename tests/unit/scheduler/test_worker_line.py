"""The line to the worker over real processes and sockets: one dies or hangs, and the next one answers.

The workers are a few lines each and import nothing heavy.
"""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from sglmoe.protocol import (
    PROTOCOL_VERSION,
    CallDone,
    FlushCache,
    Limits,
    MemorySnapshot,
    Shutdown,
    ToWorker,
    WorkerFailed,
    WorkerReady,
)
from sglmoe.scheduler.seams import WorkerLost
from sglmoe.scheduler.worker_client import WorkerProcess
from sglmoe.scheduler.worker_line import WorkerLine
from sglmoe.step_mark import StepMark
from sglmoe.transport import Receiver, Sender, plans_address, results_address

NO_MEMORY = MemorySnapshot(*[0] * sum(f.required for f in msgspec.structs.fields(MemorySnapshot)))
READY = WorkerReady(PROTOCOL_VERSION, Limits(80, 4, 8, 64, 100), NO_MEMORY, 0.0, "tiny")


def run_tiny_worker(
    kind: str, config: Any, gpu_id: int, nccl_port: int, folder: str, step_mark: StepMark
) -> None:
    """Answers calls if `kind` is "serving"; what others do, they do instead."""
    context: zmq.Context[Any] = zmq.Context()
    sender = Sender[Any](context, results_address(Path(folder)), bind=False)
    plans = Receiver[ToWorker](context, plans_address(Path(folder)), ToWorker, bind=False)
    if kind == "silent":
        time.sleep(3600)
    sender.send(WorkerFailed("no memory") if kind == "failing" else READY)
    while True:
        match plans.receive():
            case FlushCache(call_id):
                if kind == "mortal":
                    step_mark.step_id = 3
                    os.kill(os.getpid(), signal.SIGSEGV)
                if kind == "stopping":
                    os.kill(os.getpid(), signal.SIGSTOP)
                sender.send(CallDone(call_id, success=True))
            case Shutdown():
                os._exit(0)


def play(scene: Callable[[WorkerLine], Awaitable[None]], *kinds: str) -> None:
    """A scene with workers of these kinds, one after the other. No process or folder is left of them."""
    started: list[WorkerProcess] = []

    def start() -> WorkerProcess:
        kind = kinds[len(started)]
        started.append(
            WorkerProcess.start(
                run_tiny_worker, server_args=kind, config=None, gpu_id=0, nccl_port=0
            )
        )
        return started[-1]

    async def run() -> None:
        line = WorkerLine(start)
        try:
            async with asyncio.timeout(20):
                assert await line.connect() == READY
                await scene(line)
                await line.shut_down()
        finally:
            line.close()
            line.stop()

    asyncio.run(run())
    assert [worker.process.is_alive() for worker in started] == [False] * len(kinds)
    assert [worker.directory.exists() for worker in started] == [False] * len(kinds)


async def ask(line: WorkerLine, call_id: int) -> Any:
    line.send(FlushCache(call_id))
    return await line.receive()


def test_a_dead_worker_says_so_and_the_next_one_answers() -> None:
    async def scene(line: WorkerLine) -> None:
        death = await ask(line, 1)
        assert isinstance(death, WorkerFailed)
        assert "SIGSEGV" in death.error
        assert line.last_begun == 3
        for call_id in range(1000):  # nobody is there: neither blocks nor reaches the next one
            line.send(FlushCache(call_id))
        old = line.client
        assert await line.replace(silence_seconds=None) == READY
        assert old._sender._socket.closed
        assert old._receiver._socket.closed
        assert line.last_begun == -1
        assert await ask(line, 7) == CallDone(7, success=True)

    play(scene, "mortal", "serving")


def test_a_stopped_worker_is_killed_with_the_cause_it_is_given() -> None:
    async def scene(line: WorkerLine) -> None:
        line.send(FlushCache(1))
        await asyncio.sleep(0.2)
        line.kill("no progress")
        assert await line.receive() == WorkerFailed("no progress")
        await line.replace(silence_seconds=None)
        assert await ask(line, 7) == CallDone(7, success=True)

    play(scene, "stopping", "serving")


def test_a_worker_that_can_not_start_is_lost_and_another_may_be_tried() -> None:
    async def scene(line: WorkerLine) -> None:
        with pytest.raises(WorkerLost, match="no memory"):
            await line.replace(silence_seconds=None)
        with pytest.raises(WorkerLost, match="silent for 0 s while it loaded"):
            await line.replace(silence_seconds=0.2)
        await line.replace(silence_seconds=None)
        assert await ask(line, 7) == CallDone(7, success=True)

    play(scene, "serving", "failing", "silent", "serving")
