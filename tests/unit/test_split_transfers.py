"""The times of a layer whose experts come while it computes, by hand."""

import pytest

from eval.split_transfers import LayerWork, Machine, as_it_is, gains, one_by_one, split


def test_a_link_that_is_slower_than_computing() -> None:
    """Two that are there, two that come after 9 and 18; computing one takes 3, two of them the first product."""
    work = LayerWork(num_there=2, num_coming=2, rows=1)
    assert as_it_is(work, 9, 3) == 18 + 6
    assert one_by_one(work, 9, 3) == 18 + 3
    assert split(work, 9, 3) == pytest.approx(18 + 1)


def test_a_link_that_is_faster_than_computing_hides_behind_it() -> None:
    work = LayerWork(num_there=2, num_coming=2, rows=1)
    assert [how(work, 1, 3) for how in (as_it_is, one_by_one, split)] == [12, 12, 12]


def test_nothing_comes() -> None:
    work = LayerWork(num_there=4, num_coming=0, rows=1)
    assert [how(work, 9, 3) for how in (as_it_is, one_by_one, split)] == [12, 12, 12]


def test_gains_are_of_all_layers_together() -> None:
    machine = Machine("slow", link=9, expert=1, row=2)
    waits, single, apart = gains([LayerWork(2, 2, 1), LayerWork(4, 0, 1)], machine)
    assert waits == pytest.approx(12 / 36)
    assert (single, apart) == (pytest.approx(33 / 36), pytest.approx(31 / 36))
