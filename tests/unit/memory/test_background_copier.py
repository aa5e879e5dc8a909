"""One thread brings experts in, in order, behind demand loads; each load ends once."""

import threading
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from sglmoe.memory.background_copier import BackgroundCopier
from sglmoe.memory.experts import Load
from sglmoe.memory.link_gate import LinkGate
from sglmoe.memory.prefetch import Arrival
from sglmoe.memory.store import ExpertReadError

WAIT_SECONDS = 10
A, B, C = (Load(frame, 0, frame) for frame in range(3))


class Bench:
    """A copy of two chunks; `at_chunk` is called in front of each."""

    def __init__(self) -> None:
        self.demand = LinkGate()
        self.prefetch = LinkGate(above=self.demand)
        self.chunks: list[tuple[int, int]] = []  # frame, chunk
        self.at_chunk: Callable[[Load, int], None] = lambda load, chunk: None
        self.came: list[tuple[int, int]] = []  # frame, chunks copied by then
        self.marks = count()
        self.copied_after: list[int] = []
        self.copier = BackgroundCopier(
            self.copy,
            demand=self.demand,
            prefetch=self.prefetch,
            mark=lambda: next(self.marks),
            came=lambda load: self.came.append((load.frame, len(self.chunks))),
        )

    def copy(self, load: Load, mark: int, before_chunk: Callable[[], None]) -> None:
        self.copied_after.append(mark)
        for chunk in range(2):
            self.at_chunk(load, chunk)
            before_chunk()
            self.chunks.append((load.frame, chunk))

    def stop_at(self, load: Load, chunk: int) -> tuple[threading.Event, threading.Event]:
        """(is set when the copy is there, what lets it go on)."""
        there, go_on = threading.Event(), threading.Event()

        def at_chunk(its: Load, number: int) -> None:
            if (its, number) == (load, chunk):
                there.set()
                assert go_on.wait(WAIT_SECONDS)

        self.at_chunk = at_chunk
        return there, go_on

    def claim(self, load: Load) -> bool:
        self.copier.promote(load)
        return self.copier.wait(load)

    def eventually_finished(self, count: int) -> list[Arrival]:
        found: list[Arrival] = []
        for _ in range(1000):
            found += self.copier.finished()
            if len(found) >= count:
                break
            threading.Event().wait(0.01)
        return found


@pytest.fixture
def bench() -> Iterator[Bench]:
    its = Bench()
    yield its
    its.copier.close()


def test_loads_arrive_in_order_and_are_told_once(bench: Bench) -> None:
    bench.copier.begin(A)
    bench.copier.begin(B)
    assert bench.eventually_finished(2) == [Arrival(A, True), Arrival(B, True)]
    assert bench.copier.finished() == []
    assert bench.chunks == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_demand_load_holds_it_up_between_two_chunks(bench: Bench) -> None:
    there, go_on = bench.stop_at(A, 1)
    bench.copier.begin(A)
    assert there.wait(WAIT_SECONDS)
    with bench.demand.closed():
        go_on.set()
        threading.Event().wait(0.05)
        assert bench.chunks == [(0, 0)]
    assert bench.eventually_finished(1) == [Arrival(A, True)]


def test_one_that_its_layer_waits_for_is_held_up_no_more(bench: Bench) -> None:
    there, go_on = bench.stop_at(A, 1)
    bench.copier.begin(A)
    assert there.wait(WAIT_SECONDS)
    with bench.demand.closed():
        go_on.set()
        assert bench.claim(A)
    assert bench.chunks == [(0, 0), (0, 1)]
    assert bench.copier.finished() == []


def test_waiting_for_one_in_the_queue_brings_it_in_before_the_others(bench: Bench) -> None:
    there, go_on = bench.stop_at(A, 0)
    for load in (A, B, C):
        bench.copier.begin(load)
    assert there.wait(WAIT_SECONDS)
    assert bench.claim(C)
    assert bench.chunks == [(2, 0), (2, 1)]
    assert bench.copied_after == [0, 2], "each after what was queued when it was begun"
    go_on.set()
    assert bench.eventually_finished(2) == [Arrival(A, True), Arrival(B, True)]


def test_what_is_promoted_comes_next_even_while_demand_loads_move(bench: Bench) -> None:
    there, go_on = bench.stop_at(A, 0)
    for load in (A, B, C):
        bench.copier.begin(load)
    assert there.wait(WAIT_SECONDS)
    bench.copier.promote(A)
    bench.copier.promote(C)
    with bench.demand.closed():
        go_on.set()
        while len(bench.chunks) < 4:
            threading.Event().wait(0.001)
        assert bench.chunks == [(0, 0), (0, 1), (2, 0), (2, 1)], "nobody waits for C yet"
    assert bench.eventually_finished(1) == [Arrival(B, True)]
    assert bench.copier.wait(C)
    assert bench.copier.wait(A)
    assert bench.copier.finished() == []


def test_waiting_for_one_that_has_arrived(bench: Bench) -> None:
    bench.copier.begin(A)
    bench.copier.begin(B)
    while len(bench.chunks) < 4:
        threading.Event().wait(0.001)
    assert bench.claim(B)
    assert bench.eventually_finished(1) == [Arrival(A, True)]


def test_a_cancelled_copy_writes_nothing_more(bench: Bench) -> None:
    there, go_on = bench.stop_at(A, 1)
    bench.copier.begin(A)
    bench.copier.begin(B)
    assert there.wait(WAIT_SECONDS)
    bench.copier.cancel(B)  # it is in the queue
    go_on_soon = threading.Timer(0.05, go_on.set)
    go_on_soon.start()
    bench.copier.cancel(A)  # returns when the copy has noticed
    assert go_on.is_set()
    assert bench.chunks == [(0, 0)]
    bench.copier.begin(C)
    assert bench.eventually_finished(1) == [Arrival(C, True)]


def test_cancelling_does_not_wait_for_a_demand_load(bench: Bench) -> None:
    with bench.demand.closed():  # a layer was left with its loads under way
        bench.copier.begin(A)
        bench.copier.cancel(A)
    assert bench.chunks == []


@pytest.mark.parametrize("error", [ExpertReadError("expert 0: it is gone"), RuntimeError("a bug")])
def test_a_load_that_fails_is_told_too(bench: Bench, error: Exception) -> None:
    def fail(load: Load, chunk: int) -> None:
        if load is A:
            raise error

    bench.at_chunk = fail
    bench.copier.begin(A)
    bench.copier.begin(B)
    assert bench.eventually_finished(2) == [Arrival(A, False), Arrival(B, True)]


def test_what_fills_host_memory_waits_while_something_is_on_its_way(bench: Bench) -> None:
    there, go_on = bench.stop_at(A, 1)
    bench.copier.begin(A)
    assert there.wait(WAIT_SECONDS)
    assert not bench.prefetch.wait(0)
    go_on.set()
    assert bench.prefetch.wait(WAIT_SECONDS)


def test_closing_leaves_what_is_under_way(bench: Bench) -> None:
    there, go_on = bench.stop_at(A, 1)
    bench.copier.begin(A)
    assert there.wait(WAIT_SECONDS)
    threading.Timer(0.05, go_on.set).start()
    bench.copier.close()
    assert bench.chunks == [(0, 0)]


def test_what_has_come_is_told_once_before_it_is_finished_and_no_failure_is(bench: Bench) -> None:
    there, go_on = bench.stop_at(C, 1)
    for load in (A, B, C):
        bench.copier.begin(load)
    assert there.wait(WAIT_SECONDS)
    threading.Timer(0.05, go_on.set).start()
    bench.copier.cancel(C)
    assert len(bench.eventually_finished(2)) == 2
    assert bench.came == [(0, 2), (1, 4)]
