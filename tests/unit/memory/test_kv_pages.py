"""Pages in frames: 4 frames of 3 pages, 3 of which KV may take."""

from array import array

import pytest

from sglmoe.memory.arena import Frames
from sglmoe.memory.kv_pages import PagePool, Pages


class Pool:
    """A pool, and what its pages should be: every step is checked against the laws."""

    def __init__(self) -> None:
        self.frames = Frames(4)
        self.pool = PagePool(self.frames, pages_per_frame=3, max_frames=3)
        self.held: set[int] = set()
        self.idle: set[int] = set()

    def allocate(self, num_pages: int) -> list[int]:
        pages = self.pool.allocate(num_pages).tolist()
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


def test_a_frame_is_filled_before_the_next_is_opened() -> None:
    pool = Pool()
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(2) == [2, 3]
    assert pool.allocate(1) == [4]
    assert (pool.frames.num_kv, pool.pool.free_pages) == (2, 1)


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
    assert pool.allocate(2) == [7, 8]


def test_freed_pages_of_a_partly_used_frame_go_first() -> None:
    pool = Pool()
    pool.allocate(6)
    pool.unhold(1)
    pool.free(1)
    assert pool.allocate(2) == [1, 6]


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


def test_last_run_is_the_end_that_shares_a_frame() -> None:
    pool = Pool().pool

    def last_run(*pages: int) -> int:
        run: Pages = array("i", pages)
        return pool.last_run(run)

    assert last_run(0, 1, 2, 3) == 1
    assert last_run(0, 4, 3, 5) == 3
    assert last_run(2, 1) == 2


def test_letting_go_of_what_is_not_held_is_caught() -> None:
    pool = Pool()
    pool.allocate(1)
    pool.unhold(0)
    with pytest.raises(AssertionError, match="frame 0 holds 0 pages"):
        pool.unhold(0)
