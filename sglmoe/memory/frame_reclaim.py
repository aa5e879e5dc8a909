"""Which cached prefixes to evict so that the pages that become free are of use where they lie.

Both plans see the next few leaves in the order of eviction and choose among these; they know
neither the order nor who holds what.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sglmoe.memory.kv_pages import Pages

# How far eviction may depart from its order: a leaf may go before 7 whose turn it was. With 16 a
# frame costs no fewer pages in `eval.fragmentation`.
LEAVES_AHEAD = 8


class Tail(NamedTuple):
    """The last `num_pages` pages of a leaf, which is given by its place in the order."""

    leaf: int
    num_pages: int


def plan_emptying(
    leaves: Sequence[Pages], *, pages_per_frame: int, num_to_empty: Callable[[int], int]
) -> list[Tail]:
    """The tails to evict so that one frame runs empty, as few pages as can be; if that takes more
    than these leaves have, the end of the first, as far as it lies in one frame.

    `num_to_empty(frame)`: its pages in use, 0 if a running request holds one of them.
    """
    left: dict[int, int] = {}  # frame -> pages in use but for the tails of the leaves seen
    tails: dict[int, dict[int, int]] = {}  # frame -> leaf -> pages from the first one in it on
    cheapest: list[Tail] = []
    for leaf, pages in enumerate(leaves):
        for frame, start, stop in _last_runs(pages, pages_per_frame):
            if not left.setdefault(frame, num_to_empty(frame)):
                continue
            left[frame] -= stop - start
            tails.setdefault(frame, {})[leaf] = len(pages) - start
            if left[frame]:
                continue
            emptying = [Tail(*tail) for tail in tails[frame].items()]
            if not cheapest or _num_pages(emptying) < _num_pages(cheapest):
                cheapest = emptying
            if _num_pages(cheapest) <= pages_per_frame:
                return cheapest
    return cheapest or [Tail(0, _last_run(leaves[0], pages_per_frame))]


def plan_near(
    leaves: Sequence[Pages], num_pages: int, *, frame: int, pages_per_frame: int
) -> list[Tail]:
    """At most `num_pages` pages for one who goes on in this frame: there, if one of the leaves ends
    there; else those of the first leaf, wherever they lie."""
    for leaf, pages in enumerate(leaves):
        if pages[-1] // pages_per_frame == frame:
            return [Tail(leaf, min(num_pages, _last_run(pages, pages_per_frame)))]
    return [Tail(0, num_pages)]


def _last_runs(pages: Pages, pages_per_frame: int) -> Iterator[tuple[int, int, int]]:
    """(frame, start, stop) of each run of pages in one frame, from the end on."""
    stop = len(pages)
    while stop:
        frame = pages[stop - 1] // pages_per_frame
        start = stop - 1
        while start > 0 and pages[start - 1] // pages_per_frame == frame:
            start -= 1
        yield frame, start, stop
        stop = start


def _last_run(pages: Pages, pages_per_frame: int) -> int:
    _, start, stop = next(_last_runs(pages, pages_per_frame))
    return stop - start


def _num_pages(tails: Sequence[Tail]) -> int:
    return sum(tail.num_pages for tail in tails)
