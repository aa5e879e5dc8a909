"""Which ends of prefixes give a frame, or room where a request goes on: 4 pages in a frame."""

from array import array
from collections.abc import Sequence

from sglmoe.memory.frame_reclaim import Tail, plan_emptying, plan_near
from sglmoe.memory.kv_pages import Pages


def emptying(leaves: Sequence[Sequence[int]], *, idle: dict[int, int]) -> list[Tail]:
    """`idle`: pages in use by frame, of the frames that no running request uses."""
    return plan_emptying(arrays(leaves), pages_per_frame=4, num_to_empty=lambda f: idle.get(f, 0))


def near(leaves: Sequence[Sequence[int]], num_pages: int, *, frame: int) -> list[Tail]:
    return plan_near(arrays(leaves), num_pages, frame=frame, pages_per_frame=4)


def arrays(leaves: Sequence[Sequence[int]]) -> list[Pages]:
    return [array("i", pages) for pages in leaves]


def test_the_first_prefix_goes_if_that_empties_a_frame() -> None:
    # It fills frame 1 and has two pages in frame 2, alone.
    assert emptying([[4, 5, 6, 7, 8, 9], [0, 1, 2, 3]], idle={0: 4, 1: 4, 2: 2}) == [Tail(0, 2)]


def test_prefixes_that_share_a_frame_go_together() -> None:
    # Frame 0 holds two pages of each; frame 1 is full of the first one's.
    assert emptying([[4, 5, 6, 7, 0, 1], [2, 3]], idle={0: 4, 1: 4}) == [Tail(0, 2), Tail(1, 2)]


def test_a_prefix_that_lies_beside_a_running_request_is_spared() -> None:
    # A running request has page 3: frame 0 can not run empty.
    assert emptying([[0, 1, 2], [4, 5]], idle={1: 2}) == [Tail(1, 2)]


def test_pages_behind_those_in_the_frame_have_to_go_as_well() -> None:
    # Frame 0 would cost the five pages of prefix 0; frame 2 costs only prefix 1.
    first, second = [0, 1, 2, 3, 4], [8, 9, 10]
    assert emptying([first, second], idle={0: 4, 2: 3}) == [Tail(1, 3)]
    assert emptying([first], idle={0: 4, 2: 3}) == [Tail(0, 5)]


def test_nothing_can_be_had_from_the_middle_of_a_prefix() -> None:
    # Page 0 is the only one in frame 0; the 8 pages behind it lie beside running requests.
    assert emptying([[0, *range(4, 12)]], idle={0: 1}) == [Tail(0, 9)]


def test_without_a_frame_to_empty_the_end_of_the_first_goes() -> None:
    # Frame 1 has a third page, of a prefix further behind.
    assert emptying([[4, 5], [8, 12]], idle={1: 3, 2: 4, 3: 4}) == [Tail(0, 2)]


def test_room_is_made_in_the_frame_where_a_request_goes_on() -> None:
    leaves = [[0, 1], [4, 5, 8], [12, 9, 10]]
    assert near(leaves, 1, frame=2) == [Tail(1, 1)]
    assert near(leaves[::2], 3, frame=2) == [Tail(1, 2)]  # no more than lie there


def test_without_a_prefix_that_ends_there_the_first_one_gives_the_pages() -> None:
    assert near([[0, 1, 2], [4]], 2, frame=2) == [Tail(0, 2)]
    assert near([[0, 1, 2], [4]], 2, frame=-1) == [Tail(0, 2)]  # one that has no pages yet
