"""What the next step does. Pages hold 4 tokens; a candidate with one token to compute decodes."""

from typing import Any

import pytest

from sglmoe.protocol import Row, StepPlan
from sglmoe.scheduler.policy import Candidate, Memory, NewTokenRatio, PolicySettings, plan_step

PLENTY = Memory(available_pages=1000, page_tokens=4, new_token_ratio=0.5)


def settings(**changes: Any) -> PolicySettings:
    return PolicySettings(**{"max_running": 8, "max_prefill_tokens": 100} | changes)


def decoding(rid: str, *, num_tokens: int = 8, **changes: Any) -> Candidate:
    facts = {
        "num_tokens": num_tokens,
        "computed_tokens": num_tokens - 1,
        "settled_tokens": num_tokens - 1,
        "new_tokens_left": 4,
    }
    return Candidate(rid=rid, **facts | changes)


def fresh(rid: str, num_tokens: int, **changes: Any) -> Candidate:
    facts = {"num_tokens": num_tokens, "computed_tokens": 0, "new_tokens_left": 4}
    return Candidate(rid=rid, **facts | changes)


def plan(
    running: list[Candidate] | None = None,
    queued: list[Candidate] | None = None,
    *,
    memory: Memory = PLENTY,
    **changes: Any,
) -> StepPlan:
    return plan_step(
        step_id=7,
        running=running or [],
        queued=queued or [],
        memory=memory,
        settings=settings(**changes),
    ).plan


def rids(step: StepPlan) -> list[str]:
    return [row.rid for row in step.rows]


def test_running_requests_decode_together() -> None:
    assert plan([decoding("a"), decoding("b")]).rows == (Row("a", 1), Row("b", 1))


def test_prefill_goes_before_decode() -> None:
    step = plan([decoding("a")], [fresh("b", 10), fresh("c", 6)])
    assert step.rows == (Row("b", 10), Row("c", 6))


def test_mixed_chunks_do_both_and_decode_counts() -> None:
    step = plan([decoding("a")], [fresh("b", 10)], chunk_tokens=6, mix_decode=True)
    assert step.rows == (Row("a", 1), Row("b", 5))


def test_a_long_prompt_is_cut_and_continued_before_others_start() -> None:
    first = plan(queued=[fresh("a", 10), fresh("b", 3)], chunk_tokens=8)
    assert first.rows == (Row("a", 8),)
    begun = fresh("a", 10, computed_tokens=8, settled_tokens=0)
    second = plan([begun], [fresh("b", 3), fresh("c", 9)], chunk_tokens=8)
    assert second.rows == (Row("a", 2), Row("b", 3), Row("c", 3))


def test_without_chunks_prompts_go_whole_even_if_too_long() -> None:
    assert plan(queued=[fresh("a", 150), fresh("b", 3)]).rows == (Row("a", 150),)
    assert plan(queued=[fresh("b", 3), fresh("a", 150)]).rows == (Row("b", 3),)


def test_a_request_that_may_ask_for_nothing_more_gets_no_row() -> None:
    assert rids(plan([decoding("a", new_tokens_left=0), decoding("b")])) == ["b"]


def test_not_more_run_than_may() -> None:
    step = plan([decoding("a")], [fresh("b", 2), fresh("c", 2)], max_running=2)
    assert rids(step) == ["b"]


def test_a_cached_prefix_costs_no_budget() -> None:
    step = plan(queued=[fresh("a", 50, cached_tokens=48), fresh("b", 5)], chunk_tokens=6)
    assert step.rows == (Row("a", 2), Row("b", 4))


class TestMemory:
    def test_admits_what_fits_with_its_allowance(self) -> None:
        # 10 prompt + 4 new tokens = 4 pages each; 9 pages hold two.
        memory = Memory(available_pages=9, page_tokens=4, new_token_ratio=0.5)
        queued = [fresh("a", 10), fresh("b", 10), fresh("c", 10)]
        assert rids(plan([decoding("x", settled_tokens=8)], queued, memory=memory)) == ["a", "b"]

    def test_reserves_for_the_growth_of_running_requests(self) -> None:
        # "x" holds 2 pages and is expected to need (8 + 0.5 * 40) / 4 = 7: 5 more of the 9.
        memory = Memory(available_pages=9, page_tokens=4, new_token_ratio=0.5)
        running = [decoding("x", new_tokens_left=40)]
        assert rids(plan(running, [fresh("a", 10), fresh("b", 10)], memory=memory)) == ["a"]

    def test_counts_what_plans_in_flight_take(self) -> None:
        # "x" was given 20 tokens that the snapshot does not know of: (21 + 0) / 4 = 6 pages.
        memory = Memory(available_pages=9, page_tokens=4, new_token_ratio=0.0)
        running = [decoding("x", num_tokens=21, settled_tokens=0)]
        assert rids(plan(running, [fresh("a", 10)], memory=memory)) == ["x"]

    def test_the_queue_is_not_overtaken(self) -> None:
        memory = Memory(available_pages=3, page_tokens=4, new_token_ratio=0.0)
        step = plan([decoding("x")], [fresh("big", 40), fresh("small", 1)], memory=memory)
        assert rids(step) == ["x"]

    def test_alone_it_is_tried_whatever_the_estimate_says(self) -> None:
        memory = Memory(available_pages=2, page_tokens=4, new_token_ratio=1.0)
        assert rids(plan(queued=[fresh("a", 6, new_tokens_left=4000)], memory=memory)) == ["a"]


class TestOrder:
    def test_longest_cached_prefix_first(self) -> None:
        queued = [fresh("a", 9), fresh("b", 9, cached_tokens=4), fresh("c", 9, cached_tokens=8)]
        assert rids(plan(queued=queued, order="lpm")) == ["c", "b", "a"]

    def test_lpm_gives_way_to_arrival_in_a_long_queue(self) -> None:
        queued = [fresh(str(i), 9, cached_tokens=i) for i in range(129)]
        assert rids(plan(queued=queued, order="lpm"))[:3] == ["0", "1", "2"]

    def test_longest_output_first_within_a_priority(self) -> None:
        queued = [
            fresh("a", 2, rank=0, new_tokens_left=5),
            fresh("b", 2, rank=0, new_tokens_left=50),
            fresh("c", 2, rank=1, new_tokens_left=500),
        ]
        assert rids(plan(queued=queued, order="lof")) == ["b", "a", "c"]

    def test_random_is_the_same_for_the_same_step(self) -> None:
        queued = [fresh(str(i), 2) for i in range(6)]
        once = rids(plan(queued=queued, order="random"))
        assert once == rids(plan(queued=queued, order="random"))
        assert sorted(once) == [str(i) for i in range(6)]

    def test_asks_for_prefixes_of_those_who_come_next(self) -> None:
        queued = [fresh("a", 9), fresh("b", 9), fresh("c", 9)]
        assert plan(queued=queued, chunk_tokens=9).probe == ("b", "c")


class TestPreemption:
    def test_the_least_important_goes_for_someone_more_important(self) -> None:
        running = [decoding("mid", rank=5, arrival=1), decoding("low", rank=9, arrival=0)]
        step = plan(running, [fresh("top", 4, rank=0)], max_running=2, preemption_threshold=3)
        assert step.preempt == ("low",)
        assert step.rows == (Row("top", 4),)

    def test_among_equals_the_youngest_goes(self) -> None:
        running = [decoding("old", rank=9, arrival=0), decoding("young", rank=9, arrival=1)]
        step = plan(running, [fresh("top", 4, rank=0)], max_running=2, preemption_threshold=3)
        assert step.preempt == ("young",)

    def test_not_for_a_small_difference(self) -> None:
        step = plan(
            [decoding("low", rank=2)], [fresh("top", 4)], max_running=1, preemption_threshold=3
        )
        assert step.preempt == ()
        assert rids(step) == ["low"]

    def test_nobody_goes_if_that_would_not_be_enough(self) -> None:
        memory = Memory(available_pages=1, page_tokens=4, new_token_ratio=0.0)
        step = plan(
            [decoding("low", rank=9)],
            [fresh("top", 400)],
            memory=memory,
            preemption_threshold=3,
        )
        assert step.preempt == ()


def test_drop_and_preempt_are_passed_on() -> None:
    step = plan_step(
        step_id=1,
        running=(),
        queued=(),
        memory=PLENTY,
        settings=settings(),
        drop=("a",),
        preempt=("b",),
    ).plan
    assert (step.drop, step.preempt, step.rows) == (("a",), ("b",), ())


def test_new_token_ratio_sinks_slowly_and_jumps_up() -> None:
    ratio = NewTokenRatio(initial=0.7, minimum=0.1, decay=0.2)
    seen = []
    for _ in range(4):
        ratio.sink()
        seen.append(ratio.current)
    assert seen == pytest.approx([0.5, 0.3, 0.1, 0.1])
    # Two requests have used 30 of 99 tokens; each should get 20 steps further.
    ratio.after_rejection(decoded_tokens=30, allowed_tokens=99, num_running=2)
    assert ratio.current == pytest.approx(0.7)
