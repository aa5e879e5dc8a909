"""Pages in frames: 4 frames of 3 pages, 3 of which KV may take."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglmoe.memory.arena import Frames
from sglmoe.memory.kv_pages import PagePool


class Pool:
    """A pool, and what its pages should be: every step is checked against the laws."""

    def __init__(self, *, num_frames: int = 4, pages_per_frame: int = 3) -> None:
        self.frames = Frames(num_frames)
        self.pool = PagePool(
            self.frames, pages_per_frame=pages_per_frame, max_frames=num_frames - 1
        )
        self.held: set[int] = set()
        self.idle: set[int] = set()

    def allocate(self, num_pages: int, *, after: int | None = None) -> list[int]:
        pages = self.pool.allocate(num_pages, after=after).tolist()
        assert len(set(pages)) == num_pages, "not as many as were asked for"
        assert not {*pages} & (self.held | self.idle), "somebody else's pages"
        self.held.update(pages)
        self.check()
        return pages

    def unhold(self, *pages: int) -> None:
        self.pool.unhold(array("i", pages))
        self.held.difference_update(pages)
        self.idle.update(pages)
        self.check()

    def hold(self, *pages: int) -> None:
        self.pool.hold(array("i", pages))
        self.idle.difference_update(pages)
        self.held.update(pages)
        self.check()

    def free(self, *pages: int) -> None:
        self.pool.free(array("i", pages))
        self.idle.difference_update(pages)
        self.check()

    def check(self) -> None:
        held, idle = array("i", sorted(self.held)), array("i", sorted(self.idle))
        assert self.pool.violations(held=held, idle=idle) == []


def test_few_pages_fill_a_frame_before_the_next_is_opened() -> None:
    pool = Pool()
    assert pool.allocate(1) == [0]
    assert pool.allocate(1) == [1]
    assert pool.allocate(1) == [2]
    assert pool.allocate(1) == [3]
    assert (pool.frames.num_kv, pool.pool.free_pages) == (2, 2)


def test_more_than_half_a_frame_of_pages_begins_a_free_one() -> None:
    pool = Pool()
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(2) == [3, 4]
    # Of 4 pages 3 fill the last frame that KV may take; one is left over.
    assert pool.allocate(4) == [6, 7, 8, 2]
    # No frame is left to begin: what is free in the others will do.
    pool.unhold(0, 8)
    pool.free(0, 8)
    assert pool.allocate(3) == [5, 0, 8]


def test_a_request_goes_on_where_its_last_page_is() -> None:
    pool = Pool()
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(2) == [3, 4]
    assert pool.allocate(1, after=4) == [5]
    assert pool.allocate(1, after=1) == [2]
    # Its frame is full; so is every other.
    assert pool.allocate(1, after=5) == [6]


def test_a_request_without_room_goes_where_there_is_most() -> None:
    pool = Pool()
    pool.allocate(9)
    pool.unhold(1, 4, 5)
    pool.free(1, 4, 5)
    # Frame 0 has one free page, frame 1 two.
    assert pool.allocate(1, after=8) == [4]
    # Of equals, the frame that has been so longest.
    assert pool.allocate(1, after=8) == [1]
    assert pool.allocate(1, after=8) == [5]


def test_available_are_free_pages_and_the_frames_that_kv_may_take() -> None:
    pool = Pool()
    assert pool.pool.available_pages == 9  # 3 of the 4 frames
    pool.allocate(4)
    assert pool.pool.available_pages == 5
    assert pool.pool.may_grow
    pool.allocate(3)
    assert not pool.pool.may_grow
    with pytest.raises(AssertionError, match="3 of 2 pages"):
        pool.pool.allocate(3)
    assert pool.allocate(2) == [4, 5]


def test_freed_pages_of_a_partly_used_frame_go_first() -> None:
    pool = Pool()
    pool.allocate(6)
    pool.unhold(1)
    pool.free(1)
    assert [pool.allocate(1), pool.allocate(1)] == [[1], [6]]


def test_an_empty_frame_is_free_at_once() -> None:
    pool = Pool()
    pool.allocate(6)
    pool.unhold(5, 0, 4, 3)
    pool.free(5, 0, 4)
    assert pool.frames.num_kv == 2
    pool.free(3)
    assert (pool.frames.num_kv, pool.frames.num_free) == (1, 3)
    assert pool.pool.free_pages == 1


def test_idle_frames_are_those_without_a_held_page() -> None:
    pool = Pool()
    pool.allocate(5)
    pool.unhold(0, 1, 3)
    assert (pool.pool.idle_frames, pool.pool.idle_pages) == (0, 3)
    pool.unhold(2)
    assert pool.pool.idle_frames == 1
    pool.hold(1)
    assert (pool.pool.idle_frames, pool.pool.held_pages) == (0, 2)


def test_a_frame_can_run_empty_when_none_of_its_pages_is_held() -> None:
    pool = Pool()
    pool.allocate(5)
    pool.unhold(0, 1, 3)
    assert [pool.pool.num_idle(frame) for frame in (0, 1)] == [2, 1]
    assert [pool.pool.num_to_empty(frame) for frame in (0, 1)] == [0, 0]  # 2 and 4 are held
    pool.unhold(2, 4)
    assert [pool.pool.num_to_empty(frame) for frame in (0, 1)] == [3, 2]
    pool.free(1)
    assert pool.pool.num_to_empty(0) == 2


def test_letting_go_of_what_is_not_held_is_caught() -> None:
    pool = Pool()
    pool.allocate(1)
    pool.unhold(0)
    with pytest.raises(AssertionError, match="frame 0 holds 0 pages"):
        pool.unhold(0)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.data(), st.integers(1, 7))
def test_allocation_is_all_or_nothing_and_takes_nobodys_page(
    data: st.DataObject, pages_per_frame: int
) -> None:
    """`Pool.allocate` compares with what others have, `Pool.check` with the laws."""
    pool = Pool(num_frames=5, pages_per_frame=pages_per_frame)
    for _ in range(12):
        num_pages = data.draw(st.integers(0, 2 * pages_per_frame))
        after = data.draw(st.none() | st.integers(0, 5 * pages_per_frame - 1))
        if num_pages <= pool.pool.available_pages:
            pool.allocate(num_pages, after=after)
        else:
            with pytest.raises(AssertionError, match="pages"):
                pool.pool.allocate(num_pages, after=after)
            pool.check()
        unheld = (
            data.draw(st.lists(st.sampled_from(sorted(pool.held)), unique=True))
            if pool.held
            else []
        )
        pool.unhold(*unheld)
        freed = (
            data.draw(st.lists(st.sampled_from(sorted(pool.idle)), unique=True))
            if pool.idle
            else []
        )
        pool.free(*freed)
