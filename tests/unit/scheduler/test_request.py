"""What a request remembers."""

from array import array
from typing import Any

import msgspec
import pytest

from sglmoe.protocol import LogprobSpec, RoutedExperts, RowResult, TokenLogprobs
from sglmoe.scheduler.finish import StopRules
from sglmoe.scheduler.reasoning import ReasoningCounter
from sglmoe.scheduler.request import Request, RoutingRecord, State


def make(num_prompt: int = 4, **facts: object) -> Request:
    rules = StopRules(max_new_tokens=5, vocab_size=100)
    return Request(rid="r", prompt_ids=array("q", range(num_prompt)), stop=rules, **facts)  # type: ignore[arg-type]


def test_expected_progress_follows_plans_in_flight() -> None:
    request = make(10)
    request.in_flight = [8]
    assert request.expected_progress() == (8, 10)
    # The second plan computes the last two and samples: one token more, without KV yet.
    request.in_flight = [8, 8]
    assert request.expected_progress() == (10, 11)
    request.num_computed, request.in_flight = 10, [1, 1]
    request.output_ids.append(1)
    assert request.expected_progress() == (12, 13)


def test_announcement_carries_what_a_new_worker_needs() -> None:
    request = make(3)
    request.output_ids.extend([7, 8])
    spec = request.announcement()
    assert array("i", spec.prompt_ids).tolist() == [0, 1, 2]
    assert array("i", spec.output_ids).tolist() == [7, 8]


def test_prompt_logprobs_start_with_nothing_and_come_once() -> None:
    request = make(4, logprobs=LogprobSpec(start=1, num_top=1, token_ids=(9,)))
    chunk = [TokenLogprobs(i, -float(i), (-0.5,), (50,), (-2.0,)) for i in (1, 2, 3)]
    request.record_prompt_logprobs(tuple(chunk[:2]))
    request.record_prompt_logprobs(tuple(chunk[2:]))
    request.record_prompt_logprobs(tuple(chunk))  # prefilled again after a preemption
    lists = request.input_logprobs
    assert lists is not None
    assert lists.ids == [1, 2, 3]
    assert lists.values == [None, -2.0, -3.0]
    assert lists.top_ids == [None, (50,), (50,)]
    assert lists.picked_values == [None, (-2.0,), (-2.0,)]


def routing(*tokens: int) -> RoutedExperts:
    """One layer, one expert a token, numbered as the token."""
    return RoutedExperts(shape=(len(tokens), 1, 1), ids=array("i", tokens).tobytes())


def test_routing_is_put_together_by_position() -> None:
    record = RoutingRecord(start=1)
    record.put(routing(0, 1, 2), end=3)  # token 0 was not asked for
    record.put(routing(3, 4), end=5)
    record.put(routing(2, 3), end=4)  # computed again
    assert array("i", record.ids).tolist() == [1, 2, 3, 4]


def test_a_new_worker_is_not_asked_for_routing_that_is_known() -> None:
    request = make(4, routed_experts=RoutingRecord(start=1))
    assert request.announcement().routed_experts_start == 1
    request.record_routing(routing(1, 2), end=3)
    assert request.announcement().routed_experts_start == 3


def test_reasoning_is_counted_through_its_end_marker() -> None:
    counter = ReasoningCounter(end_ids=(8, 9))
    for token_id in (1, 8, 8, 9, 2, 3):
        counter.count(token_id)
    assert counter.num_tokens == 4


def test_reasoning_that_the_model_does_not_open_is_none() -> None:
    counter = ReasoningCounter(end_ids=(9,), start_ids=(5, 6))
    for token_id in (5, 7, 1):
        counter.count(token_id)
    assert counter.num_tokens == 0
    opened = ReasoningCounter(end_ids=(9,), start_ids=(5, 6))
    for token_id in (5, 6, 1, 9, 1):
        opened.count(token_id)
    assert opened.num_tokens == 4


def decoding(rules: dict[str, Any] | None = None, **facts: object) -> Request:
    """A prompt of 4 with KV, and one token, the second in flight; token 2 ends it."""
    request = make(4, **facts)
    request.stop = msgspec.structs.replace(request.stop, token_ids=frozenset({2}), **(rules or {}))
    request.state = State.RUNNING
    request.num_computed = request.furthest = 4
    request.output_ids.append(7)
    return request


def row_of(token_id: int | None = 9, **facts: Any) -> RowResult:
    return msgspec.structs.replace(RowResult("r", 5, 0, token_id), **facts)


def test_the_usual_row_is_a_token_and_its_kv() -> None:
    request = decoding()
    request.num_deaths = 1
    assert request.takes_decoded(row_of(), step_id=3)
    assert (list(request.output_ids), request.num_computed) == ([7, 9], 5)
    assert (request.furthest, request.num_deaths) == (5, 0), "it got further than ever"
    assert request.takes_decoded(row_of(num_computed=6), step_id=4)


def test_a_first_token_is_not_usual() -> None:
    """It has a time."""
    request = decoding()
    del request.output_ids[:]
    assert not request.takes_decoded(row_of(), step_id=3)


SPEC = LogprobSpec(start=0, num_top=0, token_ids=None)


@pytest.mark.parametrize(
    ("facts", "row"),
    [
        ({}, row_of(None)),
        ({}, row_of(num_computed=7)),
        ({}, row_of(grammar_done=True)),
        ({}, row_of(2)),  # ends it
        ({}, row_of(100)),  # is no token
        ({}, row_of(-1)),
        ({"logprobs": SPEC}, row_of()),
        ({"routed_experts": RoutingRecord(0)}, row_of()),
        ({"reasoning": ReasoningCounter(end_ids=[5])}, row_of()),
        ({"rules": {"strings": ("x",)}}, row_of()),
        ({"rules": {"regexes": ("x",)}}, row_of()),
        ({"rules": {"max_new_tokens": 2}}, row_of()),
        ({"state": State.QUEUED}, row_of()),
        ({"state": State.FINISHED}, row_of()),
        ({"evicted_step": 4}, row_of()),
    ],
)
def test_of_any_other_row_nothing_is_taken(facts: dict[str, Any], row: RowResult) -> None:
    """Each has something that the long way is there for."""
    request = decoding(**facts)
    request.state = facts.get("state", State.RUNNING)
    assert not request.takes_decoded(row, step_id=3)
    assert (list(request.output_ids), request.num_computed) == ([7], 4)
