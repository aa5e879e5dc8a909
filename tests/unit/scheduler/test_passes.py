"""What a pass over prompts holds, and for how long it is waited with.

The experts of a pass take 1 s to come, 100 tokens of prompts as long to compute; a decode step takes 0.1 s, and 0.01 s more
for each request. Pages abound.
"""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sglmoe.protocol import Row, StepCosts
from sglmoe.scheduler.passes import (
    Held,
    Pass,
    PassSettings,
    full_tokens,
    most_running,
    pass_tokens,
    should_wait,
)
from sglmoe.scheduler.planner import HoldingBack
from sglmoe.scheduler.policy import Candidate, Decision, Memory, PolicySettings, plan_step

STREAMED = StepCosts(stream_seconds=1.0, token_seconds=0.01, decode_seconds=0.1, row_seconds=0.01)
OVERLAPPING = replace(STREAMED, loads_overlap=True)
RESIDENT = replace(STREAMED, stream_seconds=0.0)
FILLED = PassSettings(fill=True)
PLENTY = Memory(available_pages=10_000, page_tokens=4, new_token_ratio=0.5)


def test_a_pass_is_full_when_loading_is_a_fifth_of_it_or_hidden() -> None:
    assert full_tokens(STREAMED) == 400
    assert full_tokens(OVERLAPPING) == 100
    assert full_tokens(RESIDENT) == 0
    assert full_tokens(StepCosts()) == 0, "nothing is measured yet"


class TestSize:
    """`--chunked-prefill-size` is 200, `--max-prefill-tokens` 1000."""

    def size(self, costs: StepCosts, *, most: int = 1000, num_decoding: int = 0, **its: Any) -> int:
        settings = PassSettings(**{"fill": True} | its)
        return pass_tokens(200, most, costs=costs, settings=settings, num_decoding=num_decoding)

    def test_grows_until_it_is_full(self) -> None:
        assert self.size(STREAMED) == 400

    def test_does_not_grow_beyond_what_a_step_may_compute(self) -> None:
        assert self.size(STREAMED, most=300) == 300

    def test_grows_no_further_than_the_first_token_may_take(self) -> None:
        assert self.size(STREAMED, ttft_seconds=4.0) == 300
        assert self.size(STREAMED, ttft_seconds=0.5) == 200, "that can't be kept: as configured"

    @pytest.mark.parametrize("costs", [RESIDENT, StepCosts(), OVERLAPPING])
    def test_stays_as_configured_where_that_is_full(self, costs: StepCosts) -> None:
        assert self.size(costs) == 200

    def test_stays_as_configured_when_filling_is_off(self) -> None:
        assert self.size(STREAMED, fill=False) == 200

    def test_keeps_the_time_between_tokens(self) -> None:
        assert self.size(STREAMED, itl_seconds=2.5, num_decoding=3) == 150
        assert self.size(STREAMED, itl_seconds=2.5) == 400, "nobody decodes"
        assert self.size(RESIDENT, itl_seconds=0.5, num_decoding=3, fill=False) == 50

    def test_of_a_time_that_the_experts_alone_take_it_is_half_full(self) -> None:
        assert self.size(STREAMED, itl_seconds=0.5, num_decoding=3) == 100

    @given(
        st.builds(StepCosts, st.floats(0, 10), st.floats(0, 10), st.floats(0, 1), st.floats(0, 1)),
        st.floats(0.001, 10),
        st.floats(0.001, 10),
        st.integers(0, 9),
    )
    def test_is_never_nothing(self, costs: StepCosts, ttft: float, itl: float, rows: int) -> None:
        size = self.size(costs, ttft_seconds=ttft, itl_seconds=itl, num_decoding=rows)
        assert 1 <= size <= 1000


class TestWaiting:
    """Two requests decode; a prompt of 50 tokens could be begun."""

    def waits(self, costs: StepCosts = STREAMED, *, held: Held | None = None, **its: Any) -> bool:
        settings = PassSettings(**{"fill": True} | its.pop("settings", {}))
        ready = Pass(**{"num_tokens": 50, "num_decoding": 2, "waited_seconds": (0.0,)} | its)
        return should_wait(ready, costs=costs, held=held or Held(), settings=settings)

    def test_for_others_to_share_the_experts_with(self) -> None:
        assert self.waits()

    def test_not_when_the_pass_is_full(self) -> None:
        assert self.waits(num_tokens=399)
        assert not self.waits(num_tokens=400)

    def test_not_when_nobody_decodes_meanwhile(self) -> None:
        assert not self.waits(num_decoding=0)

    def test_not_where_nothing_is_loaded_or_known(self) -> None:
        assert not self.waits(RESIDENT)
        assert not self.waits(StepCosts())

    def test_not_when_it_is_off(self) -> None:
        assert not self.waits(settings={"fill": False})

    def test_until_they_have_waited_as_long_as_a_pass_more_would_keep_the_others(self) -> None:
        """Two requests for a second."""
        assert self.waits(held=Held(seconds=1.9, request_seconds=1.9))
        assert not self.waits(held=Held(seconds=1.0, request_seconds=2.0))

    def test_however_many_decode_for_four_times_the_experts_at_most(self) -> None:
        assert self.waits(num_decoding=99, held=Held(seconds=3.9, request_seconds=3.9))
        assert not self.waits(num_decoding=99, held=Held(seconds=4.0, request_seconds=4.0))

    def test_not_when_the_first_token_would_come_too_late(self) -> None:
        """Two steps of 0.12 s, then a pass of 1.5 s."""
        target = {"ttft_seconds": 2.0}
        assert self.waits(settings=target, waited_seconds=(0.25,))
        assert not self.waits(settings=target, waited_seconds=(0.27,))
        assert not self.waits(settings=target, waited_seconds=(9.0, 0.27, 0.0))

    def test_when_it_comes_too_late_in_any_case(self) -> None:
        """A queue that a target can't be kept of is only made longer by passes that are not full."""
        target = {"ttft_seconds": 2.0}
        assert not self.waits(settings=target, waited_seconds=(0.37,))
        assert self.waits(settings=target, waited_seconds=(0.39,))


def test_as_many_decode_as_keep_the_time_between_tokens() -> None:
    assert most_running(STREAMED, PassSettings(itl_seconds=0.2)) == 10
    assert most_running(STREAMED, PassSettings(itl_seconds=0.05)) == 1
    assert most_running(STREAMED, PassSettings()) == 1 << 30
    assert most_running(StepCosts(), PassSettings(itl_seconds=0.2)) == 1 << 30


# --------------------------------------------------------------------------------------------------------- in a plan


def decoding(rid: str, **changes: Any) -> Candidate:
    return Candidate(rid=rid, num_tokens=8, computed_tokens=7, new_tokens_left=4, **changes)


def fresh(rid: str, num_tokens: int, **changes: Any) -> Candidate:
    return Candidate(
        rid=rid, num_tokens=num_tokens, computed_tokens=0, new_tokens_left=4, **changes
    )


def decide(
    running: list[Candidate],
    queued: list[Candidate],
    *,
    costs: StepCosts = STREAMED,
    held: Held | None = None,
    after_pass: bool = False,
    **changes: Any,
) -> Decision:
    return plan_step(
        step_id=7,
        running=running,
        queued=queued,
        memory=PLENTY,
        settings=PolicySettings(
            **{"max_running": 8, "max_prefill_tokens": 1000, "chunk_tokens": 200, "passes": FILLED}
            | changes
        ),
        costs=costs,
        held=held or Held(),
        after_pass=after_pass,
    )


def test_prompts_wait_while_others_decode() -> None:
    plan, num_held, _ = decide([decoding("a")], [fresh("b", 50), fresh("c", 60)])
    assert (plan.rows, num_held) == ((Row("a", 1),), 2)


def test_enough_of_them_go_at_once_and_together() -> None:
    prompts = [fresh(rid, 150) for rid in "bcd"]
    plan, num_held, _ = decide([decoding("a")], prompts)
    assert (plan.rows, num_held) == ((Row("b", 150), Row("c", 150), Row("d", 100)), 0)


def test_with_nobody_to_decode_they_go_at_once() -> None:
    assert decide([], [fresh("b", 50)]).plan.rows == (Row("b", 50),)


def test_a_pass_that_runs_anyway_takes_everyone_along() -> None:
    begun = Candidate("a", num_tokens=500, computed_tokens=450, new_tokens_left=4)
    plan, _, _ = decide([decoding("x"), begun], [fresh("b", 50)])
    assert plan.rows == (Row("a", 50), Row("b", 50))


def test_who_goes_before_others_does_not_wait_for_them() -> None:
    plan, num_held, _ = decide(
        [decoding("low", rank=9)], [fresh("top", 50)], max_running=1, preemption_threshold=0
    )
    assert (plan.rows, plan.preempt, num_held) == ((Row("top", 50),), ("low",), 0)


def test_every_wait_counts() -> None:
    """A step of 0.11 s is in flight, the pass takes 2 s."""
    target = PassSettings(fill=True, ttft_seconds=5.0)
    prompts = [fresh("b", 50, waited_seconds=0.0), fresh("c", 50, waited_seconds=2.8)]
    assert decide([decoding("a")], prompts, passes=target).num_held == 0
    assert decide([decoding("a")], prompts[:1], passes=target).num_held == 1


def test_between_two_passes_there_is_a_step_that_decodes_if_tokens_have_to_follow_soon() -> None:
    running, queued = [decoding("a")], [fresh("b", 150)]
    for settings in (PassSettings(), PassSettings(itl_seconds=2.5)):
        first = decide(running, queued, passes=settings)
        assert (first.plan.rows, first.only_prompts) == ((Row("b", 150),), True)
    second = decide(running, queued, passes=settings, after_pass=True)
    assert (second.plan.rows, second.only_prompts) == ((Row("a", 1),), False)
    assert decide([], queued, passes=settings, after_pass=True).plan.rows == (Row("b", 150),)
    assert decide(running, queued, passes=PassSettings(), after_pass=True) == first


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        rid=st.integers(0, 10**6).map(str),
        num_tokens=st.integers(1, 600),
        computed_tokens=st.just(0),
        new_tokens_left=st.integers(0, 50),
        rank=st.integers(0, 2),
        waited_seconds=st.floats(0, 9),
    ),
    max_size=8,
    unique_by=lambda candidate: candidate.rid,
)


@given(CANDIDATES, CANDIDATES, st.booleans(), st.sampled_from([None, 0]))
def test_where_nothing_is_loaded_plans_are_what_they_are_without(
    running: list[Candidate], queued: list[Candidate], mix: bool, threshold: int | None
) -> None:
    its: dict[str, Any] = {"mix_decode": mix, "preemption_threshold": threshold}
    without = decide(running, queued, passes=PassSettings(), **its)
    assert decide(running, queued, costs=RESIDENT, **its) == without
    assert decide(running, queued, costs=StepCosts(), **its) == without


def test_waiting_adds_up_over_all_who_wait_and_ends_with_a_pass() -> None:
    holding = HoldingBack()
    holding.note(1, 10.0)
    assert holding.until(12.0) == Held(2.0, 2.0)
    holding.note(3, 12.0)
    assert holding.until(13.0) == Held(3.0, 5.0)
    holding.note(0, 13.0)
    assert holding.until(20.0) == Held()
    holding.note(0, 20.0)
    assert (holding.num_passes, holding.total_seconds) == (1, 3.0)
