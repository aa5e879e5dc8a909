"""A worker's process and the line to it. A worker that dies is received as `WorkerFailed`."""

import asyncio
import contextlib
import logging
import multiprocessing
import shutil
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import zmq

from sglmoe.errors import workers
from sglmoe.protocol import (
    PROTOCOL_VERSION,
    FromWorker,
    Shutdown,
    StepResult,
    ToWorker,
    WorkerFailed,
    WorkerProgress,
    WorkerReady,
)
from sglmoe.scheduler.seams import WorkerLost
from sglmoe.start_up import start_method
from sglmoe.step_mark import StepMark
from sglmoe.transport import (
    AsyncReceiver,
    AsyncSender,
    make_socket_directory,
    plans_address,
    results_address,
)

logger = logging.getLogger(__name__)

# run_worker(server_args, config, gpu_id, nccl_port, socket_directory, step_mark)
RunWorker = Callable[[Any, Any, int, int, str, StepMark], None]

# Arbitrary: how long a dead worker's last words may take to arrive, and a live one's exit.
LAST_WORDS_SECONDS = 0.2
EXIT_SECONDS = 5.0


class WorkerProcess:
    """The worker as the operating system sees it, with the directory of the sockets to it."""

    def __init__(self, process: BaseProcess, directory: Path, step_mark: StepMark) -> None:
        self.process = process
        self.directory = directory
        self.step_mark = step_mark

    @classmethod
    def start(
        cls, run_worker: RunWorker, *, server_args: Any, config: Any, gpu_id: int, nccl_port: int
    ) -> "WorkerProcess":
        """Start a worker: by the fork server, which has its imports done already, where there is one."""
        directory, step_mark = make_socket_directory(), StepMark()
        context: Any = multiprocessing.get_context(start_method())
        process = context.Process(
            target=run_worker,
            args=(server_args, config, gpu_id, nccl_port, str(directory), step_mark),
            name="sglmoe-worker",
        )
        process.start()
        return cls(process, directory, step_mark)

    def remove_directory(self) -> None:
        """Connected sockets live on without their names, which no end of ours, however sudden, then leaves behind."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def stop(self) -> None:
        """See to it that the process is gone, and the directory with it."""
        self.process.join(0)
        if self.process.is_alive():
            self.process.kill()
        self.process.join(EXIT_SECONDS)
        self.remove_directory()


class WorkerClient:
    """Typed messages to and from a worker's process. To be made and used within one event loop."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker
        self._process = worker.process
        self._arrived: asyncio.Queue[FromWorker] = asyncio.Queue()
        self._is_connected = False  # both ways, so that the sockets' names are not needed
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._sender = AsyncSender[ToWorker](context, plans_address(worker.directory), bind=True)
        self._receiver = AsyncReceiver[FromWorker](
            context, results_address(worker.directory), FromWorker, self._on_message, bind=True
        )
        self._death = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._process.sentinel, self._on_death)
        self._report = loop.create_task(self._report_death())

    @property
    def last_begun(self) -> int:
        return self._worker.step_mark.step_id

    def send(self, message: ToWorker) -> None:
        self._sender.send(message)

    async def receive(self) -> FromWorker:
        return await self._arrived.get()

    def kill(self, cause: str) -> None:
        """End the worker, even one that is stopped; received as WorkerFailed with this cause, behind what it has said."""
        self._process.kill()
        self._arrived.put_nowait(WorkerFailed(cause))

    async def wait_until_ready(self, *, silence_seconds: float | None = None) -> WorkerReady:
        """The worker's first real message. Raises WorkerLost if it can't start, or is silent for so long."""
        while True:
            try:
                async with asyncio.timeout(silence_seconds):
                    message = await self.receive()
            except TimeoutError:
                assert silence_seconds is not None
                why = workers.silent_while_loading(seconds=silence_seconds)
                raise WorkerLost(str(why)) from None
            match message:
                case WorkerReady() as ready:
                    if ready.protocol_version != PROTOCOL_VERSION:
                        raise WorkerLost(
                            f"the worker speaks protocol {ready.protocol_version}, the scheduler {PROTOCOL_VERSION}"
                        )
                    return ready
                case WorkerProgress() as progress:
                    logger.info("Worker: %s %d/%d", progress.stage, progress.done, progress.total)
                case WorkerFailed() as failed:
                    raise WorkerLost(failed.error)
                case other:
                    raise WorkerLost(f"the worker began with {type(other).__name__}")

    async def shut_down(self) -> None:
        """Ask the worker to leave, and wait for that a little."""
        self.send(Shutdown())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_SECONDS):
                await self._death.wait()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._report.cancel()
        self._sender.close()
        self._receiver.close()

    def _on_message(self, message: FromWorker) -> None:
        self._arrived.put_nowait(message)
        if isinstance(message, StepResult) and not self._is_connected:
            self._is_connected = True
            self._worker.remove_directory()

    def _on_death(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._death.set()

    async def _report_death(self) -> None:
        await self._death.wait()
        await asyncio.sleep(LAST_WORDS_SECONDS)
        self._process.join()
        self._arrived.put_nowait(WorkerFailed(describe_exit(self._process.exitcode)))


def describe_exit(exitcode: int | None) -> str:
    """What a process's exit code says to people: ``-9`` is a kill, most likely for memory."""
    if exitcode is None or exitcode >= 0:
        return str(workers.exited(status=exitcode or 0))
    name = signal.Signals(-exitcode).name
    if name == "SIGKILL":
        return str(workers.out_of_memory())
    return str(workers.killed(signal_name=name))
