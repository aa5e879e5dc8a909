"""What steps cost, learned from made-up steps."""

import numpy as np
import pytest

from sglmoe.memory.step_times import MIN_STEPS, DecayedRatio, DecodeFit, StepTimes


def fitted(*steps: tuple[int, float], half_life: int = 256) -> tuple[float, float]:
    fit = DecodeFit(half_life)
    for num_rows, seconds in steps:
        fit.note(num_rows, 0, seconds)
    assert fit.line is not None
    fixed, slope, load_slope = fit.line
    assert load_slope == 0
    return fixed, slope


def test_steps_on_a_line_give_that_line() -> None:
    # 10 ms, and 2 ms for each row.
    assert fitted((1, 0.012), (4, 0.018), (2, 0.014)) == pytest.approx((0.010, 0.002))


def test_the_fit_is_least_squares_with_weights_that_halve() -> None:
    rows, seconds = [3, 9, 4, 7, 1], [0.02, 0.05, 0.04, 0.03, 0.01]
    weights = 0.5 ** (np.arange(5)[::-1] / 2)
    slope, fixed = np.polyfit(rows, seconds, 1, w=np.sqrt(weights))
    steps = zip(rows, seconds, strict=True)
    assert fitted(*steps, half_life=2) == pytest.approx((fixed, slope))


def test_one_size_of_step_says_nothing_about_others() -> None:
    assert fitted((4, 0.02), (4, 0.04)) == pytest.approx((0.03, 0), abs=1e-4)


def test_a_slope_once_seen_stays_while_all_steps_are_of_one_size() -> None:
    """A server that is kept at its limit for hours must not forget what a request costs."""
    steps = [(1, 0.012), (4, 0.018)] + [(4, 0.018)] * 5_000
    assert fitted(*steps) == pytest.approx((0.010, 0.002), rel=1e-3)
    # The device has become slower by 10 ms since.
    steps += [(4, 0.028)] * 5_000
    assert fitted(*steps) == pytest.approx((0.020, 0.002), rel=1e-3)


def test_neither_part_is_negative() -> None:
    assert fitted((1, 0.03), (9, 0.01)) == pytest.approx((0.02, 0), abs=1e-4)
    fixed, slope = fitted((4, 0.001), (8, 0.02))
    assert fixed == 0
    assert slope > 0


def test_loads_that_come_while_a_step_computes_make_it_slower() -> None:
    # 10 ms, 2 ms for each row, half a millisecond for each load.
    generator = np.random.default_rng(0)
    fit = DecodeFit()
    for _ in range(50):
        rows, loads = generator.integers(1, 9), generator.integers(0, 60)
        fit.note(rows, loads, 0.010 + 0.002 * rows + 0.0005 * loads)
    assert fit.line == pytest.approx((0.010, 0.002, 0.0005), rel=0.01)


def test_the_first_steps_blame_nothing_on_loads_and_later_ones_half_at_most() -> None:
    fit = DecodeFit()
    for step in range(MIN_STEPS):
        loads = 20 if step % 2 else 10
        fit.note(1, loads, 0.001 * loads)  # as if nothing else took any time
    assert fit.line is not None
    assert fit.line[2] == 0
    for loads in (20, 10):
        fit.note(1, loads, 0.001 * loads)
    assert fit.line == pytest.approx((0.0075, 0, 0.0005), rel=0.02)


def test_loads_that_change_nothing_cost_nothing() -> None:
    generator = np.random.default_rng(0)
    fit = DecodeFit()
    for _ in range(2000):
        fit.note(8, generator.integers(0, 60), generator.normal(0.1, 0.01))
    assert fit.line == pytest.approx((0.1, 0, 0), abs=0.002)
    assert fit.line is not None
    assert fit.line[2] < 0.0001


def test_a_row_costs_no_more_for_the_loads_it_brings() -> None:
    # More rows, more loads, in steps of two sizes; each row takes 2 ms, loads nothing.
    fit = DecodeFit()
    for step in range(500):
        rows = 1 + 7 * (step % 2)
        fit.note(rows, 5 * rows + step % 3, 0.010 + 0.002 * rows)
    assert fit.line == pytest.approx((0.010, 0.002, 0), rel=0.05, abs=1e-5)


def test_no_part_of_the_plane_is_negative() -> None:
    fit = DecodeFit()
    for rows, loads, seconds in ((4, 10, 0.001), (8, 40, 0.03), (4, 20, 0.010), (8, 0, 0.002)):
        fit.note(rows, loads, seconds)
        assert min(fit.line or ()) >= 0


def test_nothing_is_known_before_it_was_measured() -> None:
    times = StepTimes()
    assert (times.load_seconds, times.prefill_token_seconds, times.model) == (None, None, None)


def test_a_model_has_what_was_measured() -> None:
    times = StepTimes(loads_overlap=True)
    times.note_decode(1, 0.012)
    times.note_decode(4, 0.018)
    model = times.model
    assert model is not None
    assert (model.loads_overlap, model.load_seconds) == (True, 0), "no expert was ever loaded"
    times.note_loads(3, waited_seconds=0.012, link_seconds=0.0)
    times.note_loads(0, waited_seconds=0.0, link_seconds=0.0)
    assert times.model is not None
    assert times.model.load_seconds == pytest.approx(0.004)
    assert times.model.compute_seconds(10) == pytest.approx(0.030)


def test_loads_and_prompts_count_by_their_number_not_by_step() -> None:
    times = StepTimes()
    times.note_loads(1, waited_seconds=0.010, link_seconds=0.0)  # one alone waits for the disk
    times.note_loads(99, waited_seconds=0.090, link_seconds=0.0)
    assert times.load_seconds == pytest.approx(0.001, rel=0.01)
    times.note_prefill(100, 0.1)
    times.note_prefill(300, 0.6)
    assert times.prefill_token_seconds == pytest.approx(0.7 / 400, rel=0.01)


def test_what_a_load_costs_is_the_wait_and_what_it_slows_down() -> None:
    times = StepTimes()
    for loads in (0, 10) * MIN_STEPS:  # each waits for 1 ms, and computing takes 2 ms longer
        times.note_loads(loads, waited_seconds=0.001 * loads, link_seconds=0.0)
        times.note_decode(1, 0.05 + 0.002 * loads, loads)
    assert times.load_seconds == pytest.approx(0.003)
    assert times.model is not None
    assert times.model.step_seconds(1, 10) == pytest.approx(0.05 + 0.03)
    times.note_prefill(100, 0.3, 50)  # 0.1 of it for loads
    assert times.prefill_token_seconds == pytest.approx(0.002)
    for _ in range(1000):
        times.note_prefill(100, 0.2, 5000)
    assert times.prefill_token_seconds == pytest.approx(0.001), "half of it, whatever was loaded"


def test_loads_that_nobody_sees_have_no_price_until_steps_that_load_more_are_longer() -> None:
    """A device copies while the host goes on: what it took shows in the step alone, and not in the first 32."""
    times = StepTimes()
    for number in range(40):
        loads = number % 4
        times.note_loads(loads, waited_seconds=0.0, link_seconds=0.0)
        times.note_decode(1, 0.010 + 0.002 * loads, loads)
        assert (times.load_seconds is None) == (number < 32)
    assert times.load_seconds == pytest.approx(0.002)


def test_a_load_holds_computing_up_for_no_longer_than_it_takes() -> None:
    """Each is waited for for 0.2 ms of its 0.6; steps with 10 of them are 50 ms slower, whatever the reason."""
    times = StepTimes()
    for loads in (0, 10) * MIN_STEPS:
        times.note_loads(loads, waited_seconds=0.0002 * loads, link_seconds=0.0006 * loads)
        times.note_decode(4, 0.05 + 0.005 * loads, loads)
    assert times.load_seconds == pytest.approx(0.0006)
    model = times.model
    assert model is not None
    assert model.compute_seconds(4) == pytest.approx(0.075 - 5 * 0.0004, rel=0.01)


def test_what_a_load_may_not_cost_is_left_to_rows() -> None:
    """10 loads more in steps of 4 rows more: 8 ms between them, of which loads can have 4 at most."""
    times = StepTimes()
    for rows, loads in ((4, 10), (8, 20)) * MIN_STEPS:
        times.note_loads(loads, waited_seconds=0.0, link_seconds=0.0004 * loads)
        times.note_decode(rows, 0.002 * rows, loads)
    assert times.model is not None
    assert times.model.request_seconds >= 0.001 * 0.99


def test_the_link_is_busy_whether_anybody_waits_or_not() -> None:
    times = StepTimes()
    times.note_loads(4, waited_seconds=0.001, link_seconds=0.020)
    assert times.link_seconds == pytest.approx(0.005)
    assert times.load_seconds == pytest.approx(0.00025)


def test_short_prefills_say_nothing_about_tokens() -> None:
    times = StepTimes()
    times.note_prefill(31, 0.5)
    assert times.prefill_token_seconds is None
    times.note_prefill(32, 0.032)
    assert times.prefill_token_seconds == pytest.approx(0.001)


def test_a_note_counts_half_after_its_half_life() -> None:
    ratio = DecayedRatio(half_life=2)
    for amount in (30.0, 0.0, 0.0):
        ratio.note(amount, 1)
    # Weights 1/2, 0.707, 1.
    assert ratio.ratio == pytest.approx(15 / (0.5 + 0.5**0.5 + 1))
