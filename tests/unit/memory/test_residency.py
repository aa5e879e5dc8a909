"""How many requests should run: 2 layers of 4 experts, 12 frames, a page a frame, 2 pages a request.

So R requests leave 12 - 2R frames to experts, but 2 at least: all 8 fit beside 2 requests, and KV
has room for 5. Any expert is used by one request with probability 1/2, by R with 1 - 1/2^R. A step
computes for 10 ms and one for each request, and loads an expert in 10 ms:

    R   frames  used   misses                          step      tokens/s
    1   10      4      0                               11.00 ms  90.9
    2   8       6      0                               12.00 ms  166.7
    3   6       7      3 ranks beyond 5:  2.625        39.25 ms  76.4
    4   4       7.5    6 ranks beyond 2:  5.625        70.25 ms  56.9
    5   2       7.75   8 ranks beyond 0:  7.75         92.50 ms  54.1
"""

from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglmoe.memory.residency import (
    MAX_CHANGE_RATIO,
    MIN_GAIN_RATIO,
    MIN_GAIN_RATIO_OF_HOLDING_BACK,
    ExpertUses,
    MissCurve,
    ResidencySnapshot,
    StepModel,
    expert_frames,
    most_running,
    numbers_to_try,
    plan_residency,
    predict,
)

MODEL = StepModel(fixed_seconds=0.010, request_seconds=0.001, load_seconds=0.010)
EVEN = MissCurve(ExpertUses(np.full((2, 4), 0.5), 1))


def snapshot(**changes: Any) -> ResidencySnapshot:
    facts = {
        "num_frames": 12,
        "floor_frames": 2,
        "pages_per_frame": 1,
        "pages_per_request": 2.0,
        "num_running": 5,
        "max_running": 16,
        "curve": EVEN,
        "model": MODEL,
    }
    return ResidencySnapshot(**facts | changes)


# ------------------------------------------------------------------------------------- predictions


def test_steps_are_predicted_as_in_the_table_above() -> None:
    table = [predict(snapshot(), MODEL, number) for number in range(1, 6)]
    assert [p.expert_frames for p in table] == [10, 8, 6, 4, 2]
    assert [p.misses for p in table] == pytest.approx([0, 0, 2.625, 5.625, 7.75])
    assert [p.step_seconds for p in table] == pytest.approx(
        [0.011, 0.012, 0.03925, 0.07025, 0.0925]
    )
    rates = [p.tokens_per_second for p in table]
    assert rates == pytest.approx([90.9, 166.7, 76.4, 56.9, 54.1], abs=0.05)


def test_loads_behind_computing_cost_only_what_is_longer() -> None:
    overlapping = msgspec.structs.replace(MODEL, loads_overlap=True)
    # 3 requests compute for 13 ms; 1 expert is loaded within that, 2 are not.
    assert overlapping.step_seconds(3, 1) == pytest.approx(0.013)
    assert overlapping.step_seconds(3, 2) == pytest.approx(0.020)


def test_use_probability_is_carried_over_to_other_numbers_of_requests() -> None:
    # Used by 1 of 2 requests in 3 of 4 steps: by each with 1/2. All 8 experts miss without frames.
    curve = MissCurve(ExpertUses(np.full((2, 4), 0.75), 2))
    assert [curve.misses(number, 0) for number in (1, 2, 3)] == pytest.approx([4, 6, 7])


def test_the_experts_that_are_used_most_are_resident() -> None:
    uses = np.array([[0.9, 0.1, 0.0, 0.0], [0.8, 0.2, 0.0, 0.0]])
    curve = MissCurve(ExpertUses(uses, 1))
    # Three frames: those of 0.9 and 0.8 stay; the third is what 0.2 and 0.1 pass through.
    assert curve.misses(1, 3) == pytest.approx(0.3)


def test_an_expert_seen_in_all_steps_of_many_requests_need_not_be_every_requests() -> None:
    curve = MissCurve(ExpertUses(np.ones((1, 1)), 32))
    assert curve.misses(1, 0) == pytest.approx(1 - (1 / 64) ** (1 / 32))


def test_measured_misses_correct_the_predicted_ones() -> None:
    assert predict(snapshot(miss_correction=2.0), MODEL, 3).misses == pytest.approx(5.25)
    # 7 of 8 experts are used, and no more can miss.
    assert predict(snapshot(miss_correction=8.0), MODEL, 3).misses == pytest.approx(7)


# ------------------------------------------------------------------------------------------ limits


def limits(now: ResidencySnapshot, num_plans: int, *, demand: int) -> list[int | None]:
    """Plan again and again; as many run as are there and may."""
    found = []
    for _ in range(num_plans):
        limit = plan_residency(now).running_limit
        found.append(limit)
        running = demand if limit is None else min(demand, limit)
        now = msgspec.structs.replace(now, limit=limit, num_running=running)
    return found


def test_a_server_that_waits_for_experts_comes_down_step_by_step() -> None:
    assert limits(snapshot(), 5, demand=5) == [4, 3, 2, 2, 2]


def test_a_plan_tells_what_it_expects_and_why() -> None:
    plan = plan_residency(snapshot())
    assert (plan.running_limit, plan.num_running, plan.expert_frames) == (4, 4, 4)
    assert (plan.misses, plan.step_seconds) == pytest.approx((5.625, 0.07025))
    assert plan.tokens_per_second == pytest.approx(56.9, abs=0.05)
    assert plan.reason == (
        "4 requests at a time promise 56.9 tokens/s with 5.6 misses a step in 4 frames, "
        "5 54.1 with 7.8 in 2; the best are 2 with 166.7"
    )


def test_those_who_still_run_beyond_the_limit_do_not_count() -> None:
    """None is preempted for the limit, so 5 may run under one of 4."""
    assert plan_residency(snapshot(limit=4, num_running=5)).running_limit == 3


def test_a_limit_is_lifted_step_by_step_when_loads_become_cheap() -> None:
    fast = msgspec.structs.replace(MODEL, load_seconds=1e-6)
    # 5 are as many as KV has room for: from there memory itself is the limit.
    assert limits(snapshot(model=fast, limit=2, num_running=2), 4, demand=9) == [3, 4, None, None]


def test_a_limit_that_nobody_feels_stays() -> None:
    fast = msgspec.structs.replace(MODEL, load_seconds=1e-6)
    assert plan_residency(snapshot(model=fast, limit=4, num_running=1)).running_limit == 4


def with_2_over_3(ratio: float) -> StepModel:
    """2 promise 2 / 12 ms, so many times what 3 do: 3 / (13 ms + 2.625 load)."""
    load_seconds = (3 / (2 / 0.012 / ratio) - 0.013) / 2.625
    return msgspec.structs.replace(MODEL, load_seconds=load_seconds)


def test_nobody_is_held_back_for_a_small_gain() -> None:
    for ratio, expected in ((1.06, 3), (1.09, 3), (1.11, 2)):
        now = snapshot(model=with_2_over_3(ratio), limit=3, num_running=3)
        assert plan_residency(now).running_limit == expected


def test_more_are_let_in_for_a_smaller_one() -> None:
    for ratio, expected in ((1 / 1.04, 2), (1 / 1.06, 3)):
        now = snapshot(model=with_2_over_3(ratio), limit=2, num_running=2)
        assert plan_residency(now).running_limit == expected


def test_one_may_always_run() -> None:
    # Even alone a request misses, and two are worse than one.
    slow = msgspec.structs.replace(MODEL, load_seconds=1.0)
    tight = snapshot(model=slow, pages_per_request=8.0, num_frames=18, num_running=2)
    assert limits(tight, 3, demand=2) == [1, 1, 1]


def test_no_limit_while_nothing_is_known() -> None:
    plan = plan_residency(snapshot(model=None, limit=2))
    assert (plan.running_limit, plan.reason) == (None, "no decode step has been measured yet")


def test_no_limit_where_all_experts_fit() -> None:
    # 18 frames: 5 requests of 2 pages leave 8.
    plan = plan_residency(snapshot(num_frames=18, max_running=5, limit=2))
    assert plan.running_limit is None
    assert plan.reason == "all 8 experts fit beside the KV of 5 requests"


class TestDeadZone:
    """Loads overlap, and KV takes one frame however many run: 4 requests miss 7.5 experts a step and
    compute for 14 ms. 8 would compute for 18 ms, and miss no more than 8 experts."""

    def limit(self, compute_over_load: float) -> int | None:
        model = StepModel(0.010, 0.001, 0.014 / compute_over_load / 7.5, loads_overlap=True)
        now = snapshot(
            num_frames=3, pages_per_frame=8, pages_per_request=0.5, limit=4, num_running=4
        )
        plan = plan_residency(msgspec.structs.replace(now, model=model))
        return plan.running_limit

    def test_more_run_when_loads_are_hidden_easily(self) -> None:
        assert self.limit(1.05) == 5

    def test_nothing_changes_when_loads_take_hardly_longer(self) -> None:
        assert self.limit(0.99) == 4
        assert self.limit(0.91) == 4

    def test_the_prediction_decides_when_loads_take_longer(self) -> None:
        """Where all experts miss anyway, fewer requests would not make that better."""
        assert self.limit(0.85) == 5


# -------------------------------------------------------------------------------------- properties

PROBABILITIES = st.lists(st.floats(0, 1), min_size=8, max_size=8)


@st.composite
def snapshots(draw: st.DrawFn) -> ResidencySnapshot:
    uses = np.array(draw(PROBABILITIES)).reshape(2, 4)
    most = draw(st.integers(1, 40))
    return snapshot(
        num_frames=draw(st.integers(3, 60)),
        pages_per_frame=draw(st.integers(1, 4)),
        pages_per_request=draw(st.floats(0.1, 20)),
        num_running=draw(st.integers(1, most)),
        max_running=most,
        curve=MissCurve(ExpertUses(uses, draw(st.floats(1, 32)))),
        model=StepModel(
            fixed_seconds=draw(st.floats(1e-3, 1)),
            request_seconds=draw(st.floats(0, 0.1)),
            load_seconds=draw(st.floats(0, 1)),
            loads_overlap=draw(st.booleans()),
        ),
        miss_correction=draw(st.floats(0.1, 8)),
        limit=draw(st.none() | st.integers(1, most)),
    )


@given(snapshots())
@settings(deadline=None, derandomize=True, database=None)
def test_any_plan_is_within_its_bounds(now: ResidencySnapshot) -> None:
    plan = plan_residency(now)
    limit, most = plan.running_limit, most_running(now)
    assert now.floor_frames <= plan.expert_frames <= now.num_frames
    assert plan.step_seconds > 0
    assert plan.reason
    if limit is None or limit == now.limit:
        return
    present = min(now.num_running, now.limit or now.num_running)
    assert 1 <= limit <= most or limit < present
    change = max(1, present * MAX_CHANGE_RATIO)
    if now.limit is None or limit < now.limit:
        assert present - change <= limit < present, "lowered by more than a quarter of what runs"
    else:
        assert limit <= now.limit + change
    rates = {n: predict(now, now.model, n).tokens_per_second for n in numbers_to_try(present, most)}
    is_lower = limit < present
    best = max(rates[n] for n in rates if (n < present) == is_lower)
    least = MIN_GAIN_RATIO_OF_HOLDING_BACK if is_lower else MIN_GAIN_RATIO
    assert best > rates[present] * (1 + least), "changed for less than it must be worth"


@given(snapshots())
@settings(deadline=None, derandomize=True, database=None)
def test_more_requests_leave_fewer_frames_and_more_misses(now: ResidencySnapshot) -> None:
    table = [predict(now, now.model, number) for number in range(1, 12)]
    for fewer, more in pairwise(table):
        assert more.expert_frames <= fewer.expert_frames
        assert more.misses >= fewer.misses - 1e-5
    for frames in range(8):
        assert now.curve.misses(4, frames) >= now.curve.misses(4, frames + 1) - 1e-5


@given(snapshots(), st.integers(1, 60))
@settings(deadline=None, derandomize=True, database=None)
def test_limits_settle(now: ResidencySnapshot, demand: int) -> None:
    """With the same load for ever, the limit comes to rest, and where it rests nothing is to be gained."""
    model = msgspec.structs.replace(now.model, loads_overlap=False)  # no dead zone
    demand = min(demand, most_running(now))
    now = msgspec.structs.replace(now, num_running=demand, limit=None, model=model)
    found = limits(now, 60, demand=demand)
    assert len(set(found[-20:])) == 1
    running = min(demand, found[-1] or demand)
    rates = {
        number: predict(now, model, number).tokens_per_second
        for number in numbers_to_try(running, most_running(now))
        if number <= demand
    }
    for number, rate in rates.items():
        least = MIN_GAIN_RATIO_OF_HOLDING_BACK if number < running else MIN_GAIN_RATIO
        assert rate <= rates[running] * (1 + least) + 1e-9


def test_the_present_number_is_always_among_those_tried() -> None:
    for present in (1, 7, 16, 17, 33, 250):
        for most in (1, 20, 256):
            tried = numbers_to_try(present, most)
            assert present in tried
            assert tried == sorted(set(tried))
            assert max(tried) <= max(present, most)
            assert len(tried) <= 15


def test_nothing_is_said_about_more_than_twice_as_many_as_run() -> None:
    assert max(numbers_to_try(3, 256)) == 6
    assert max(numbers_to_try(100, 256)) == 200


def test_frames_are_rounded_for_kv_not_for_experts() -> None:
    # 3 requests of 1.5 pages take 5 pages, in frames of 4 two.
    assert expert_frames(snapshot(pages_per_frame=4, pages_per_request=1.5), 3) == 10
