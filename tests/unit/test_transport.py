"""Two sockets in a private directory, in one process."""

import asyncio
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.asyncio

from sglmoe.protocol import CallDone, FlushCache, FromWorker, Shutdown, ToWorker
from sglmoe.transport import (
    AsyncReceiver,
    AsyncSender,
    Receiver,
    Sender,
    make_socket_directory,
    plans_address,
    results_address,
)


@pytest.fixture
def directory() -> Iterator[Path]:
    path = make_socket_directory()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)  # a failed test must not wait for its sockets


def test_only_we_may_enter_the_directory(directory: Path) -> None:
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_messages_arrive_in_order_even_when_sent_before_the_other_end_is_there(
    directory: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    address = plans_address(directory)
    sender: Sender[ToWorker] = Sender(context, address, bind=False)
    sender.send(FlushCache(call_id=1))
    sender.send(Shutdown())
    receiver: Receiver[ToWorker] = Receiver(context, address, ToWorker, bind=True)
    assert receiver.receive(timeout_seconds=5) == FlushCache(call_id=1)
    assert receiver.receive(timeout_seconds=5) == Shutdown()
    assert receiver.receive(timeout_seconds=0) is None
    sender.close()
    receiver.close()


def test_a_message_of_the_other_direction_is_refused(
    directory: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    address = plans_address(directory)
    receiver: Receiver[ToWorker] = Receiver(context, address, ToWorker, bind=True)
    sender: Sender[FromWorker] = Sender(context, address, bind=False)
    sender.send(CallDone(call_id=1, success=True))
    with pytest.raises(msgspec.ValidationError):
        receiver.receive(timeout_seconds=5)
    sender.close()
    receiver.close()


def test_the_asynchronous_ends_speak_to_the_blocking_ones(
    directory: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    async def scheduler() -> FromWorker:
        loop_context = zmq.asyncio.Context()
        plans: AsyncSender[ToWorker] = AsyncSender(
            loop_context, plans_address(directory), bind=True
        )
        results: AsyncReceiver[FromWorker] = AsyncReceiver(
            loop_context, results_address(directory), FromWorker, bind=True
        )
        answer = await asyncio.gather(
            results.receive(), asyncio.to_thread(worker), plans.send(FlushCache(call_id=3))
        )
        plans.close()
        results.close()
        loop_context.term()
        return answer[0]

    def worker() -> None:
        plans: Receiver[ToWorker] = Receiver(
            context, plans_address(directory), ToWorker, bind=False
        )
        results: Sender[FromWorker] = Sender(context, results_address(directory), bind=False)
        message = plans.receive(timeout_seconds=5)
        assert isinstance(message, FlushCache)
        results.send(CallDone(call_id=message.call_id, success=True))
        plans.close()
        results.close()

    assert asyncio.run(scheduler()) == CallDone(call_id=3, success=True)
