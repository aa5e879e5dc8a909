"""Calls to the worker that are answered by `CallDone`."""

import asyncio
from collections.abc import Callable

import msgspec

from sglmoe.protocol import CallDone, ToWorker, WorkerCall


class WorkerCalls:
    """Numbers calls and hands every answer to whoever waits for it."""

    def __init__(self, send: Callable[[ToWorker], None]) -> None:
        self._send = send
        self._waiting: dict[int, asyncio.Future[CallDone]] = {}
        self._num_calls = 0

    async def call(self, message: WorkerCall) -> CallDone:
        """Send a call (its call_id is replaced) and wait for the answer."""
        call_id = self._num_calls
        self._num_calls += 1
        future: asyncio.Future[CallDone] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = future
        self._send(msgspec.structs.replace(message, call_id=call_id))
        return await future

    def answer(self, done: CallDone) -> None:
        future = self._waiting.pop(done.call_id, None)
        if future is not None and not future.done():
            future.set_result(done)

    def fail_all(self, message: str) -> None:
        for call_id in list(self._waiting):
            self.answer(CallDone(call_id, success=False, message=message))
