"""Does prefetching pay? Windows of 24 decode steps, of which 4 more before each don't count."""

import pytest

from sglmoe.prediction.advisor import AUDITION_STEPS
from sglmoe.prediction.trial import (
    HOLD_STEPS,
    MAX_HOLD_STEPS,
    NUM_PAIRS,
    RETRY_STEPS,
    SETTLING_STEPS,
    WARM_UP_STEPS,
    WINDOW_STEPS,
    Trial,
    Verdict,
    Window,
    judge,
)

TRIAL_STEPS = 2 * NUM_PAIRS * (WINDOW_STEPS + SETTLING_STEPS)


def window(mean_seconds: float, mean_rows: int = 4) -> Window:
    return Window(num_rows=10 * mean_rows, num_steps=10, seconds=10 * mean_seconds)


def run(trial: Trial, num_steps: int, *, off: float = 1.0, on: float) -> list[Verdict]:
    """Steps of 4 rows that take so long without prefetching and with it."""
    verdicts = [trial.step_done(4, on if trial.is_on else off) for _ in range(num_steps)]
    return [verdict for verdict in verdicts if verdict is not None]


def warm_trial() -> Trial:
    """One that begins with the next step."""
    trial = Trial()
    assert run(trial, WARM_UP_STEPS, on=9.0) == []
    return trial


def test_the_median_pair_decides() -> None:
    faster, slower = (window(1.0), window(0.9)), (window(1.0), window(5.0))
    assert judge([faster, slower, faster]) == (Verdict.PAYS, pytest.approx(0.9))
    assert judge([faster, slower, slower]) == (Verdict.DOES_NOT_PAY, pytest.approx(5.0))
    hardly = (window(1.0), window(0.995))
    assert judge([hardly])[0] is Verdict.DOES_NOT_PAY


def test_windows_of_other_loads_are_not_compared() -> None:
    other_load = (window(1.0, mean_rows=4), window(0.5, mean_rows=3))
    faster = (window(1.0), window(0.9))
    assert judge([other_load, faster, faster]) == (Verdict.PAYS, pytest.approx(0.9))
    assert judge([other_load, other_load, faster])[0] is Verdict.UNDECIDED


def test_steps_with_and_without_take_turns() -> None:
    trial = warm_trial()
    seen = []
    for _ in range(TRIAL_STEPS):
        seen.append(trial.is_on)
        trial.step_done(4, 1.0)
    one = WINDOW_STEPS + SETTLING_STEPS
    assert seen == ([False] * one + [True] * one) * NUM_PAIRS


def test_it_stays_on_where_it_pays_and_is_tried_again_later() -> None:
    trial = warm_trial()
    assert run(trial, TRIAL_STEPS, on=0.8) == [Verdict.PAYS]
    assert trial.ratio == pytest.approx(0.8)
    for _ in range(HOLD_STEPS):
        assert trial.is_on
        trial.step_done(4, 0.8)
    assert not trial.is_on
    assert run(trial, TRIAL_STEPS, on=1.2) == [Verdict.DOES_NOT_PAY], "now it does not"
    assert not trial.is_on


def test_trials_that_come_to_the_same_get_rarer() -> None:
    trial = warm_trial()
    run(trial, TRIAL_STEPS, on=1.2)
    holds = []
    for _ in range(7):
        num_steps = 0
        while not run(trial, 1, on=1.2):
            num_steps += 1
        holds.append(num_steps + 1 - TRIAL_STEPS)
    assert holds == [HOLD_STEPS * 2**n for n in range(5)] + [MAX_HOLD_STEPS] * 2
    assert TRIAL_STEPS / 2 / MAX_HOLD_STEPS < 0.01, "so little of the time is spent on it"


def test_it_rests_where_it_does_not_pay_until_shortly_before_the_next_trial() -> None:
    trial = warm_trial()
    run(trial, TRIAL_STEPS, on=1.2)
    run(trial, HOLD_STEPS - WARM_UP_STEPS - 1, on=1.2)
    assert trial.is_resting
    run(trial, 1, on=1.2)
    assert not trial.is_resting
    assert not trial.is_on
    trial = warm_trial()
    run(trial, TRIAL_STEPS, on=0.8)
    assert not trial.is_resting, "it is on"


def test_windows_without_are_without_predictions_too() -> None:
    trial = Trial()
    for _ in range(WARM_UP_STEPS):
        assert (trial.is_on, trial.is_resting) == (False, False), "one is to be picked first"
        trial.step_done(4, 1.0)
    for _ in range(TRIAL_STEPS):
        assert trial.is_resting is not trial.is_on
        trial.step_done(4, 1.0)


def test_one_is_picked_before_the_first_trial() -> None:
    assert AUDITION_STEPS < WARM_UP_STEPS


def test_a_window_begins_with_steps_that_do_not_count() -> None:
    """They run on what the window before has left in memory."""
    trial = warm_trial()
    since_change = 0
    was_on = False
    verdict = None
    while verdict is None:
        since_change = 0 if trial.is_on != was_on else since_change + 1
        was_on = trial.is_on
        settling = since_change < SETTLING_STEPS
        verdict = trial.step_done(4, 100.0 if settling else 0.5 if was_on else 1.0)
    assert trial.ratio == pytest.approx(0.5)


def test_a_load_that_changes_all_the_time_decides_nothing() -> None:
    trial = warm_trial()
    run(trial, TRIAL_STEPS, on=0.8)
    run(trial, HOLD_STEPS, on=0.8)
    rows = 0
    verdict = None
    while verdict is None:
        rows += 1
        verdict = trial.step_done(rows, 9.0)
    assert verdict is Verdict.UNDECIDED
    assert trial.is_on, "what was found before holds"
    for _ in range(RETRY_STEPS):
        trial.step_done(4, 0.8)
    assert not trial.is_on, "the next trial"
