"""Messages through shared memory: whole, in order, or not at all; nobody waits for a slow reader."""

import multiprocessing
import os
import random
import time
import zlib
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglmoe.predictor import ring as ring_module
from sglmoe.predictor.ring import NUM_PLACES, Ring, RingReceiver, RingSender

HEADER = 2  # msgpack's, of up to 255 bytes


class Ends:
    """Both of them, in one process: a message is some bytes."""

    def __init__(self, num_bytes: int):
        ring = Ring(num_bytes)
        self.sender: RingSender[bytes] = RingSender(ring)
        self.receiver: RingReceiver[bytes] = RingReceiver(ring, bytes)

    def sent(self, *sizes: int) -> list[bool]:
        """Whether messages took, that are so large in the ring; each of one letter."""
        return [self.sender.try_send(letters(size)) for size in sizes]

    def received(self) -> list[int]:
        sizes = []
        while (message := self.receiver.receive_now()) is not None:
            sizes.append(len(message) + HEADER)
        return sizes


def letters(size: int) -> bytes:
    return b"x" * (size - HEADER)


def test_messages_arrive_once_and_in_order() -> None:
    ends = Ends(100)
    assert ends.receiver.receive_now() is None
    assert ends.sent(30, 20, 50) == [True, True, True]
    assert ends.received() == [30, 20, 50]
    assert ends.received() == []


def test_what_has_no_room_is_refused_and_the_next_one_that_has_is_not() -> None:
    ends = Ends(100)
    assert ends.sent(60, 50, 40) == [True, False, True]
    assert ends.sent(10) == [False]
    assert ends.received() == [60, 40]
    assert ends.sent(101, 100) == [False, True]
    assert ends.received() == [100]


def test_a_message_lies_in_one_piece_behind_the_last_or_before_the_first() -> None:
    ends = Ends(100)
    ends.sent(40, 40)
    assert ends.receiver.receive_now() == letters(40)
    assert ends.sent(41, 30, 11, 10) == [False, True, False, True], "20 at the end, 40 at the start"
    assert ends.received() == [40, 30, 10]


def test_as_many_wait_as_there_are_places() -> None:
    ends = Ends(1 << 20)
    assert ends.sent(*[10] * NUM_PLACES) == [True] * NUM_PLACES
    assert ends.sent(10) == [False]
    ends.receiver.receive_now()
    assert ends.sent(10, 10) == [True, False]


@given(st.lists(st.one_of(st.none(), st.integers(3, 70)), max_size=200))
def test_whatever_is_taken_comes_out_whole(steps: list[int | None]) -> None:
    """Sizes are sent, None receives: what waits is what was said to be taken, and nothing that fits is refused."""
    ends, waiting = Ends(100), []
    for number, size in enumerate(steps):
        if size is None:
            assert ends.receiver.receive_now() == (waiting.pop(0) if waiting else None)
            continue
        message = bytes([number]) * (size - HEADER)
        if ends.sender.try_send(message):
            waiting.append(message)
        else:
            assert waiting, "an empty one takes what it has bytes for"
            sizes = [len(its) + HEADER for its in waiting]
            # Lost are, at most, the ends that were too short for it, or for one that waits.
            assert sum(sizes) + size + max(size, *sizes) > 100
    assert [ends.receiver.receive_now() for _ in waiting] == waiting


def start(target: Callable[..., None], *rings: Ring) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=target, args=rings, daemon=True)
    process.start()
    return process


class Numbered(msgspec.Struct, frozen=True):
    number: int
    noise: bytes
    checksum: int


NUM_TAKEN = 5000


def send_some(ring: Ring, tried: Ring) -> None:
    """Another process: as fast as it can, until so many were taken. Says how many it has tried."""
    sender: RingSender[Numbered] = RingSender(ring)
    noise = os.urandom(4096)
    num_tried = num_taken = 0
    while num_taken < NUM_TAKEN:
        its = noise[num_tried % 7 : random.randrange(8, 4096)]
        num_taken += sender.try_send(Numbered(num_tried, its, zlib.crc32(its)))
        num_tried += 1
    RingSender[int](tried).try_send(num_tried)


def test_between_processes_nothing_is_torn_and_what_is_missing_was_refused() -> None:
    ring, tried = Ring(16_000), Ring(100)
    process = start(send_some, ring, tried)
    receiver: RingReceiver[Numbered] = RingReceiver(ring, Numbered)
    num_tried: RingReceiver[int] = RingReceiver(tried, int)
    numbers: list[int] = []
    while len(numbers) < NUM_TAKEN:
        message = receiver.receive_now()
        if message is not None:
            assert zlib.crc32(message.noise) == message.checksum
            numbers.append(message.number)
    assert numbers == sorted(set(numbers))
    assert num_tried.receive() > numbers[-1]
    assert receiver.receive_now() is None
    process.join()


def test_who_looks_again_finds_it_without_being_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    ends, naps = Ends(100), []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            ends.sent(10)

    monkeypatch.setattr(ring_module.time, "sleep", sleep)
    assert ends.receiver.receive(num_looks=5, look_seconds=0.25) == letters(10)
    assert naps == [0.25, 0.25]


def send_late(ring: Ring) -> None:
    time.sleep(0.1)
    RingSender[int](ring).try_send(7)


def test_who_waits_is_woken() -> None:
    ring = Ring(100)
    process = start(send_late, ring)
    assert RingReceiver[int](ring, int).receive() == 7
    process.join()


def test_the_memory_has_no_name_that_could_stay() -> None:
    ring = Ring(100)
    assert os.readlink(f"/proc/self/fd/{ring._memory._file}") == "/memfd:sglmoe (deleted)"
    before = len(os.listdir("/proc/self/fd"))
    del ring
    assert len(os.listdir("/proc/self/fd")) == before - 2, "its file, and the mapping's"
