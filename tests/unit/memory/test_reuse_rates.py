"""How likely idle pages are to be found again: what was observed, and what follows from it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglmoe.memory import reuse_rates
from sglmoe.memory.reuse_rates import (
    MAX_PAGES,
    NUM_AGES,
    STEPS_BETWEEN_TABLES,
    ReuseRates,
    age_of,
    gittins_indices,
)


def pass_steps(rates: ReuseRates, num_steps: int) -> None:
    for _ in range(num_steps):
        rates.begin_step()


def test_ages_are_binned_by_powers_of_two() -> None:
    assert [age_of(steps) for steps in (0, 1, 2, 3, 6, 7)] == [0, 1, 1, 2, 2, 3]
    assert age_of(10**9) == NUM_AGES - 1


def test_what_comes_back_is_worth_more_than_what_does_not() -> None:
    # Every 8 steps one page that had been found before, and one that had not, become idle. The
    # former are found again 8 steps later, the latter never.
    rates = ReuseRates()
    for number in range(400):
        if number:
            rates.reuse(1, rates.step - 8, 1)
        rates.idle(1, 1)
        rates.idle(0, 1)
        pass_steps(rates, 8)
    now = rates.step
    assert rates.rate(1, now) == pytest.approx(1 / 8, rel=0.3)
    assert rates.rate(0, now) < 0.02
    assert rates.rate(1, now) > rates.rate(1, now - 100)


def test_found_more_often_than_once_is_one_class() -> None:
    rates = ReuseRates()
    assert rates.rate(2, 0) == rates.rate(9, 0)


def test_those_that_nobody_finds_count_while_they_wait() -> None:
    # 16 pages idle for long: evidence that pages of their age are not found, before they ever are.
    rates = ReuseRates()
    before = rates.rate(0, 0)
    for _ in range(STEPS_BETWEEN_TABLES):
        rates.idle(0, 16)
        rates.begin_step()
    assert rates.rate(0, rates.step) < before


def test_a_reuse_of_what_is_too_old_to_be_kept_is_ignored() -> None:
    rates = ReuseRates()
    rates.idle(0, 3)
    rates.reuse(0, since=0, num_pages=5)  # more than there were
    rates.reuse(0, since=7, num_pages=1)  # none became idle then
    rates.reuse(0, since=0, num_pages=3)
    assert sum(rates._reuses[0]) == 3


def test_of_too_many_steps_the_oldest_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server runs for months: what it remembers of each step must have an end."""
    monkeypatch.setattr(reuse_rates, "MAX_STARTS", 3)
    rates = ReuseRates()
    for _ in range(5):  # steps 0 to 4
        rates.idle(0, 2)
        rates.begin_step()
    assert list(rates._by_start[0]) == [2, 3, 4]
    assert sum(len(queue) for queue in rates._idle[0]) == 3
    rates.reuse(0, since=1, num_pages=1)
    assert sum(rates._reuses[0]) == 0
    rates.reuse(0, since=2, num_pages=1)
    assert sum(rates._reuses[0]) == 1


def test_what_is_given_up_counts_for_as_long_as_it_was_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reuse_rates, "MAX_STARTS", 1)
    rates = ReuseRates()
    rates.idle(0, 4)
    pass_steps(rates, 2)
    rates.idle(0, 1)
    assert rates._exposure[0][:3] == [4, 4, 0]  # one step in the first bin, one in the second


def test_bins_forget() -> None:
    rates = ReuseRates()
    for _ in range(3):
        rates.idle(0, int(MAX_PAGES))
        rates.begin_step()
    assert rates._exposure[0][0] <= MAX_PAGES


@given(st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=12))
def test_indices_are_never_below_the_rate_now_nor_above_the_highest_to_come(
    hazards: list[float],
) -> None:
    indices = gittins_indices(hazards)
    assert all(i >= h * (1 - 1e-9) for i, h in zip(indices, hazards, strict=True))
    assert all(i <= max(hazards[b:]) * (1 + 1e-9) for b, i in enumerate(indices))


def test_an_index_looks_ahead_as_far_as_that_pays() -> None:
    # Nothing comes back at once, but in bin 2, which is 4 steps wide, one in ten does each step.
    low, high = 1e-6, 0.1
    indices = gittins_indices([low, low, high, low])
    # From bin 1 on: 2 steps of waiting, then about 4 * (1 - 0.2) at the high rate.
    chance = 1 - math.exp(-0.4)
    assert indices[2] == pytest.approx(high)
    assert indices[1] == pytest.approx(chance / (2 + chance / high), rel=1e-3)
    assert indices[0] == pytest.approx(chance / (3 + chance / high), rel=1e-3)
    assert indices[3] == pytest.approx(low)
