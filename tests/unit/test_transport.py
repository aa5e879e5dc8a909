"""Two sockets in a private directory, in one process."""

import asyncio
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

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
        answer: asyncio.Future[FromWorker] = asyncio.get_running_loop().create_future()
        plans: AsyncSender[ToWorker] = AsyncSender(context, plans_address(directory), bind=True)
        results: AsyncReceiver[FromWorker] = AsyncReceiver(
            context, results_address(directory), FromWorker, answer.set_result, bind=True
        )
        plans.send(FlushCache(call_id=3))  # nobody is there yet
        await asyncio.gather(answer, asyncio.to_thread(worker))
        plans.close()
        results.close()
        return answer.result()

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


def test_the_asynchronous_ends_take_no_cpu_while_nothing_comes(
    directory: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    """A descriptor that stays readable makes the loop spin."""

    async def use() -> float:
        """CPU time of a while in which both ends are connected, and no message comes."""
        plans: AsyncSender[ToWorker] = AsyncSender(context, plans_address(directory), bind=True)
        peer: Receiver[ToWorker] = Receiver(context, plans_address(directory), ToWorker, bind=False)
        received: list[ToWorker] = []
        results: AsyncReceiver[ToWorker] = AsyncReceiver(
            context, results_address(directory), ToWorker, received.append, bind=True
        )
        voice: Sender[ToWorker] = Sender(context, results_address(directory), bind=False)
        before = time.thread_time()
        await asyncio.sleep(0.3)
        used = time.thread_time() - before
        for call_id in range(3):
            plans.send(FlushCache(call_id))
            voice.send(FlushCache(call_id))
            await asyncio.sleep(0.02)
        assert received == [FlushCache(call_id) for call_id in range(3)]
        assert [peer.receive(5) for _ in range(3)] == received
        for end in (plans, results, peer, voice):
            end.close()
        return used

    assert asyncio.run(use()) < 0.005  # it takes a tenth of that
