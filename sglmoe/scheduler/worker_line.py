"""The line to whichever worker serves now: starts the first worker, and others in its place."""

import asyncio
from collections.abc import Callable

from sglmoe.protocol import FromWorker, ToWorker, WorkerReady
from sglmoe.scheduler.worker_client import WorkerClient, WorkerProcess


class WorkerLine:
    """A `WorkerChannel`. The first worker starts at once; the rest needs an event loop, from `connect` on."""

    def __init__(self, start: Callable[[], WorkerProcess]) -> None:
        self._start = start
        self._process = start()
        self._client: WorkerClient | None = None
        self._load_seconds = 0.0  # of the first

    async def connect(self) -> WorkerReady:
        """Wait for the first worker. Raises WorkerLost if it can't start."""
        self._client = WorkerClient(self._process)
        ready = await self._client.wait_until_ready()
        self._load_seconds = ready.load_seconds
        return ready

    @property
    def client(self) -> WorkerClient:
        assert self._client is not None, "connect() comes first"
        return self._client

    @property
    def last_begun(self) -> int:
        return self.client.last_begun

    def send(self, message: ToWorker) -> None:
        self.client.send(message)

    async def receive(self) -> FromWorker:
        return await self.client.receive()

    def kill(self, cause: str) -> None:
        self.client.kill(cause)

    async def replace(self, *, silence_seconds: float | None) -> WorkerReady:
        """See `WorkerChannel`."""
        self.client.close()
        await asyncio.to_thread(
            self._process.stop
        )  # a large one takes a while to give its memory back
        self._process = self._start()
        self._client = WorkerClient(self._process)
        if silence_seconds is not None:
            silence_seconds += self._load_seconds
        return await self._client.wait_until_ready(silence_seconds=silence_seconds)

    async def shut_down(self) -> None:
        """Ask the worker to leave, and wait for that a little."""
        await self.client.shut_down()

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def stop(self) -> None:
        """See to it that no process is left."""
        self._process.stop()
