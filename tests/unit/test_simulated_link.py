"""A link in virtual time: 1000 bytes a second, 1 s of latency, experts of 2000 bytes, chunks of 500."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.simulated_link import LinkSpeed, SimulatedLink
from sglmoe.memory.experts import Load

SPEED = LinkSpeed(bytes_per_second=1000, latency_seconds=1.0, chunk_bytes=500)
A, B, C, D = (Load(frame, 0, frame) for frame in range(4))


def new_link(speed: LinkSpeed = SPEED) -> SimulatedLink:
    return SimulatedLink(speed, expert_bytes=2000)


def claim(link: SimulatedLink, load: Load) -> bool:
    link.promote(load)
    return link.wait(load)


def loads(link: SimulatedLink) -> list[Load]:
    return [arrival.load for arrival in link.finished()]


def test_demand_loads_of_a_group_share_one_latency() -> None:
    link = new_link()
    link.load([A, B])
    assert (link.now, link.stall_seconds, link.busy_seconds) == (5.0, 5.0, 5.0)
    assert link.bytes_moved == 4000


def test_background_loads_move_while_the_caller_computes() -> None:
    # Each takes 1 s of latency and 2 s of bytes.
    link = new_link()
    link.begin(A)
    link.begin(B)
    link.compute(2.75)
    assert loads(link) == []
    link.compute(0.25)
    assert loads(link) == [A]
    assert loads(link) == []  # told once
    link.compute(10.0)
    assert loads(link) == [B]
    assert (link.now, link.stall_seconds) == (13.0, 0.0)
    assert link.busy_seconds == pytest.approx(6.0)
    assert link.bytes_moved == 4000


def test_demand_waits_for_the_rest_of_a_chunk() -> None:
    link = new_link()
    link.begin(A)
    link.compute(1.25)  # half of the first chunk
    link.load([B])
    assert link.delay_seconds == 0.25
    assert link.now == 1.25 + 0.25 + 3.0
    link.compute(1.25)  # of the 1.5 s that were left
    assert loads(link) == []
    link.compute(0.25)
    assert loads(link) == [A]


def test_demand_does_not_wait_for_what_has_not_begun_to_move() -> None:
    link = new_link()
    link.begin(A)
    link.compute(0.6)  # within its latency
    link.load([B])
    assert link.delay_seconds == 0


def test_demand_does_not_wait_between_two_chunks() -> None:
    link = new_link(LinkSpeed(bytes_per_second=1000, latency_seconds=0.1, chunk_bytes=100))
    link.begin(A)
    for _ in range(3):
        link.compute(0.1)  # its latency and two chunks: 0.30000000000000004 s
    link.load([B])
    assert link.delay_seconds == 0


def test_what_is_needed_now_overtakes() -> None:
    link = new_link()
    for load in (A, B, C):
        link.begin(load)
    link.compute(1.4)  # A is 0.1 s before the end of a chunk
    assert claim(link, C)
    assert link.now == pytest.approx(1.4 + 0.1 + 3.0)
    assert loads(link) == []  # C has been handed over
    link.compute(1.5)
    assert loads(link) == [A]
    link.compute(3.0)
    assert loads(link) == [B]


def test_waiting_for_the_one_that_moves_takes_what_is_left_of_it() -> None:
    link = new_link()
    link.begin(A)
    link.compute(2.75)
    assert claim(link, A)
    assert (link.now, link.delay_seconds) == (3.0, 0.0)


def test_one_that_was_promoted_is_told_only_to_who_waits_for_it() -> None:
    link = new_link()
    link.begin(A)
    link.begin(B)
    link.promote(A)
    link.compute(6.0)
    assert loads(link) == [B]
    assert link.wait(A)
    assert (link.now, loads(link)) == (6.0, [])


def test_waiting_for_what_is_there_takes_no_time() -> None:
    link = new_link()
    link.begin(A)
    link.compute(4.0)
    assert claim(link, A)
    assert link.now == 4.0
    assert loads(link) == []


def test_a_cancelled_load_ends_with_its_chunk() -> None:
    link = new_link()
    for load in (A, B, C):
        link.begin(load)
    link.compute(1.2)
    link.cancel(B)  # nothing of it has moved
    assert link.now == 1.2
    link.cancel(A)
    assert link.now == 1.5
    assert link.bytes_moved == 500
    link.compute(3.0)
    assert loads(link) == [C]


def test_a_load_that_has_ended_is_cancelled_too() -> None:
    link = new_link()
    link.begin(A)
    link.compute(3.0)
    link.cancel(A)
    assert loads(link) == []
    assert link.now == 3.0


def test_a_load_that_ends_with_its_chunk_while_being_cancelled_is_not_reported() -> None:
    link = new_link()
    link.begin(A)
    link.compute(2.75)  # in its last chunk
    link.cancel(A)
    link.compute(1.0)
    assert loads(link) == []


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "demand", "compute", "finished", "wait", "cancel"]),
        st.integers(0, 5),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(ACTIONS, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([300, 500, 2000, 9999]))
def test_whatever_happens(
    actions: list[tuple[str, int]], latency_seconds: float, chunk_bytes: int
) -> None:
    """No byte beyond the bandwidth, demand late by a chunk at most, every begun load ends once."""
    speed = LinkSpeed(1000, latency_seconds, chunk_bytes)
    link = new_link(speed)
    under_way: list[Load] = []
    num_delivered = num_begun = num_demanded = 0
    for action, number in actions:
        before, delay = link.now, link.delay_seconds
        match action:
            case "begin":
                under_way.append(Load(num_begun, 0, 0))
                link.begin(under_way[-1])
                num_begun += 1
            case "demand":
                link.load([Load(-1, 1, 0)] * (number + 1))
                num_demanded += number + 1
                own_seconds = speed.seconds(2000 * (number + 1))
                assert link.now - before - own_seconds <= chunk_bytes / 1000 + 1e-9
            case "compute":
                link.compute(number * 0.37)
                assert link.now == before + number * 0.37
            case "finished":
                for arrival in link.finished():
                    under_way.remove(arrival.load)  # once: else it isn't in the list
                    num_delivered += 1
            case "wait" if under_way:
                assert claim(link, under_way.pop(number % len(under_way)))
                num_delivered += 1
            case "cancel" if under_way:
                link.cancel(under_way.pop(number % len(under_way)))
                assert link.now - before <= chunk_bytes / 1000 + 1e-9
        assert link.delay_seconds - delay <= chunk_bytes / 1000 + 1e-9
        assert (num_demanded + num_delivered) * 2000 <= link.bytes_moved + 1
        assert link.bytes_moved <= 1000 * link.now + 1
        assert link.busy_seconds <= link.now + 1e-9
    link.compute(1e3)
    assert loads(link) == under_way  # in the order in which they were begun
