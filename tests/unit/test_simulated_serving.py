"""The scheduler on a virtual clock, over bursts and lulls: see `eval/simulated_serving.py`, which checks every step of it.

A pass over prompts takes half a second for its experts, and 8,000 tokens a second are computed; 64 requests run.
"""

from array import array
from collections.abc import Sequence

import pytest

from eval.bursty_trace import Arrival, bursty_trace
from eval.simulated_serving import (
    RESIDENT,
    STREAMED,
    Outcome,
    settings,
    simulate,
    violations,
)
from sglmoe.scheduler.finish import StopRules
from sglmoe.scheduler.passes import MOST_STREAMS
from sglmoe.scheduler.request import Request, State
from sglmoe.scheduler.roster import Roster

TRACE = bursty_trace(600, per_second=6)


def check(outcome: Outcome, trace: Sequence[Arrival] = TRACE) -> None:
    """Each request ends once, with all its tokens, in the order of their arrival."""
    assert [request.rid for request in outcome.requests] == [str(i) for i in range(len(trace))]
    ended = [request.rid for request in outcome.timeline.ended]
    assert sorted(ended) == sorted(request.rid for request in outcome.requests)
    for request, arrival in zip(outcome.requests, trace, strict=True):
        assert request.num_output_tokens == arrival.num_output
        first = arrival.num_prompt
        assert request.output_ids.tolist() == list(range(first, first + arrival.num_output))


def begun(outcome: Outcome) -> list[float]:
    return [request.timing.scheduled_at for request in outcome.requests]


def test_where_nothing_is_loaded_all_is_as_it_is_without() -> None:
    without = simulate(TRACE, RESIDENT, settings(64))
    filled = simulate(TRACE, RESIDENT, settings(64, fill=True))
    assert filled.timeline.gaps == without.timeline.gaps
    assert filled.timeline.first_token_seconds == without.timeline.first_token_seconds


@pytest.mark.parametrize(("mix", "ratio"), [(False, 0.85), (True, 0.95)])
def test_filled_passes_are_fewer_and_nobody_is_overtaken_or_forgotten(
    mix: bool, ratio: float
) -> None:
    without = simulate(TRACE, STREAMED, settings(64, mix=mix))
    filled = simulate(TRACE, STREAMED, settings(64, mix=mix, fill=True))
    for outcome in (without, filled):
        check(outcome)
        assert begun(outcome) == sorted(begun(outcome)), "someone was overtaken"
    assert filled.worker.num_passes < 0.8 * without.worker.num_passes
    assert filled.worker.busy_seconds < ratio * without.worker.busy_seconds


def test_alone_a_request_does_not_wait_for_others() -> None:
    trace = [TRACE[0]._replace(at=10.0)]
    without = simulate(trace, STREAMED, settings(64))
    filled = simulate(trace, STREAMED, settings(64, fill=True))
    assert filled.timeline.first_token_seconds == without.timeline.first_token_seconds


def test_one_request_and_a_crowd_that_decodes() -> None:
    """Nobody else comes: it waits for its share of what a pass costs the others, and no longer."""
    crowd = [TRACE[0]._replace(at=0.0, num_prompt=100, num_output=200) for _ in range(63)]
    late = TRACE[0]._replace(at=5.0, num_prompt=100, num_output=2)
    outcome = simulate([*crowd, late], STREAMED, settings(64, fill=True))
    waited = outcome.requests[-1].timing.scheduled_at - 5.0
    step_seconds = STREAMED.decode_seconds + 64 * STREAMED.row_seconds
    longest = MOST_STREAMS * STREAMED.stream_seconds
    assert longest <= waited <= longest + 3 * step_seconds


def test_a_target_for_the_first_token_bounds_the_wait() -> None:
    crowd = [TRACE[0]._replace(at=0.0, num_prompt=100, num_output=200) for _ in range(63)]
    late = TRACE[0]._replace(at=5.0, num_prompt=100, num_output=2)
    policy = settings(64, fill=True, ttft_seconds=1.5)
    outcome = simulate([*crowd, late], STREAMED, policy)
    assert 1.2 < outcome.timeline.first_token_seconds[-1] <= 1.5


def test_a_target_between_tokens_limits_how_many_run() -> None:
    """60 ms and half a millisecond for each: 20 requests in 70 ms."""
    trace = [TRACE[0]._replace(at=0.0, num_prompt=100, num_output=50) for _ in range(60)]
    target = STREAMED.decode_seconds + 20 * STREAMED.row_seconds + 1e-9
    outcome = simulate(trace, STREAMED, settings(64, fill=True, itl_seconds=target))
    median = outcome.figures["median_itl_seconds"]
    assert median == pytest.approx(target), (
        "not the 90 ms of all at once, and not one after the other"
    )


def test_with_a_target_between_tokens_prompts_and_decoding_take_turns() -> None:
    """Ten long prompts come at once; a pass of them takes a second, a step that decodes less than a tenth."""
    crowd = [Arrival(0.0, num_prompt=100, num_output=150) for _ in range(20)]
    long = [Arrival(5.0, num_prompt=4000, num_output=2) for _ in range(10)]
    gaps = {}
    for seconds in (None, 0.9):
        policy = settings(64, fill=True, itl_seconds=seconds)
        gaps[seconds] = max(simulate([*crowd, *long], STREAMED, policy).timeline.gaps)
    assert gaps[0.9] < 1.2
    assert gaps[None] > 5


def test_where_memory_is_short_all_end_too() -> None:
    """A page each at first, fourteen in the end, and room for 300; admitted as if they did not grow."""
    trace = [Arrival(i / 10, num_prompt=16, num_output=200) for i in range(100)]
    policy = settings(64, fill=True)
    outcome = simulate(trace, STREAMED, policy, num_pages=300, new_token_ratio=0.0)
    check(outcome, trace)
    assert outcome.figures["num_retractions"] > 0


def test_what_must_not_be_is_seen() -> None:
    roster = Roster(use_priority=False, low_values_first=False)
    requests = [Request(str(i), array("q", [1]), StopRules(1, 9)) for i in range(3)]
    for request in requests:
        roster.number(request)
        roster.enter(request)
    roster.start(requests[0])
    assert violations(roster) == []
    roster.queue.reverse()
    assert violations(roster) == ["the queue is out of order"]
    roster.queue.pop()
    assert violations(roster) == ["a request is in no list, or in two"]
    requests[2].state = State.RUNNING
    assert "the queue holds a request of another state" in violations(roster)
