"""Who of those that wait is next. Prompts of a few tokens; those with the same ones are alike."""

from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from test_scheduler import LIMITS, NO_MEMORY

from sglmoe.protocol import MemorySnapshot, StepCosts, StepPlan, StepResult
from sglmoe.scheduler.affinity import (
    MOST_OVERTAKEN,
    NUM_CONSIDERED,
    SKETCH_BITS,
    Crowd,
    Waiting,
    admission_order,
    sketch_of,
)
from sglmoe.scheduler.finish import StopRules, aborted
from sglmoe.scheduler.planner import Planner
from sglmoe.scheduler.policy import NewTokenRatio, PolicySettings
from sglmoe.scheduler.request import Request
from sglmoe.scheduler.roster import Roster

LOW, HIGH = [1, 2, 3], [7, 8, 9]


def order(
    waiting: Sequence[Sequence[int]],
    running: Sequence[Sequence[int]],
    *,
    num_places: int = 1,
    overtaken: dict[int, int] | None = None,
) -> list[int]:
    counts = overtaken or {}
    return admission_order(
        [Waiting(sketch_of(ids), counts.get(i, 0)) for i, ids in enumerate(waiting)],
        [sketch_of(ids) for ids in running],
        num_places=num_places,
    )


def test_likeness_is_the_share_of_tokens_in_common() -> None:
    crowd = Crowd([sketch_of(ids) for ids in ([1, 2, 3], [3, 4, 5], [7, 7])])
    assert crowd.likeness(sketch_of([3, 2, 1, 1])).tolist() == [1.0, 0.2, 0.0]


def test_token_ids_beyond_the_sketch_come_round() -> None:
    assert (sketch_of([SKETCH_BITS + 1]) == sketch_of([1])).all()
    assert (sketch_of([SKETCH_BITS - 1]) != sketch_of([1])).any()


def test_who_is_like_those_that_run_goes_first() -> None:
    assert order([HIGH, LOW, LOW], [LOW, LOW, HIGH]) == [1, 0, 2]
    assert order([HIGH, LOW, LOW], [HIGH, LOW, HIGH]) == [0, 1, 2]


def test_by_arrival_where_all_are_alike_or_nobody_runs() -> None:
    assert order([LOW, LOW], [LOW]) == [0, 1]
    assert order([LOW, HIGH], []) == [0, 1]
    assert order([], [LOW]) == []


def test_whoever_was_picked_is_company_for_the_next() -> None:
    """Nobody runs: the first begins, and draws the third."""
    assert order([HIGH, LOW, HIGH, LOW], [], num_places=2) == [0, 2, 1, 3]


def test_only_places_are_given_out_of_turn() -> None:
    assert order([LOW, HIGH, LOW, HIGH], [HIGH], num_places=1) == [1, 0, 2, 3]


def test_only_the_first_are_considered() -> None:
    far = [LOW] * NUM_CONSIDERED + [HIGH]
    assert order(far, [HIGH])[0] == 0
    assert order(far[1:], [HIGH])[0] == NUM_CONSIDERED - 1


def test_who_was_overtaken_often_is_overtaken_by_nobody() -> None:
    """The second can't be: the third does not go before it, though the first does."""
    waiting = [LOW, LOW, HIGH]
    assert order(waiting, [HIGH], overtaken={1: MOST_OVERTAKEN - 1}) == [2, 0, 1]
    assert order(waiting, [HIGH], overtaken={1: MOST_OVERTAKEN}) == [0, 1, 2]
    assert order([LOW, HIGH, HIGH], [HIGH], overtaken={1: MOST_OVERTAKEN})[0] == 1, "itself it may"


def test_every_place_counts() -> None:
    """The first is overtaken for the last time, and then has its place."""
    waiting = [LOW, HIGH, HIGH]
    overtaken = {0: MOST_OVERTAKEN - 1}
    assert order(waiting, [HIGH], num_places=2, overtaken=overtaken) == [1, 0, 2]


@given(
    st.lists(st.sampled_from([LOW, HIGH, [2, 3, 7], [5]]), min_size=1, max_size=90),
    st.integers(1, 5),
)
def test_all_are_admitted_and_nobody_is_overtaken_too_often(
    prompts: list[list[int]], num_places: int
) -> None:
    """Plan by plan, as the planner counts; the company stays the same, so the unlike wait the longest."""
    queue, overtaken, admitted = (
        list(range(len(prompts))),
        dict.fromkeys(range(len(prompts)), 0),
        [],
    )
    while queue:
        counts = {place: overtaken[number] for place, number in enumerate(queue)}
        found = order([prompts[i] for i in queue], [LOW], num_places=num_places, overtaken=counts)
        assert sorted(found) == list(range(len(queue)))
        for number in [queue[place] for place in found[:num_places]]:
            for senior in queue[: queue.index(number)]:
                overtaken[senior] += 1
            queue.remove(number)
            admitted.append(number)
    for place, number in enumerate(admitted):
        assert sum(other > number for other in admitted[:place]) <= MOST_OVERTAKEN


# ------------------------------------------------------------------------------------------------------- in the planner

STREAMED = StepCosts(stream_seconds=1.0)


class Desk:
    """A planner whose two places are taken by requests with low tokens, and those that wait. Answers come at once."""

    def __init__(self, *, affinity: bool = True, use_priority: bool = False, order: str = "fcfs"):
        self.roster = Roster(use_priority=use_priority, low_values_first=True)
        self.planner = Planner(
            roster=self.roster,
            limits=LIMITS,
            snapshot=self.snapshot(STREAMED),
            policy=PolicySettings(2, 100, order=order, expert_affinity=affinity),  # type: ignore[arg-type]
            ratio=NewTokenRatio(initial=0.0, minimum=0.0, decay=0.0),
        )
        for rid in ("run 1", "run 2"):
            self.add(rid, LOW)
        self.step()

    @staticmethod
    def snapshot(costs: StepCosts) -> MemorySnapshot:
        return replace(NO_MEMORY, total_pages=50, page_tokens=4, costs=costs)

    def add(self, rid: str, prompt: list[int], priority: int | None = None) -> Request:
        request = Request(rid, array("q", prompt), StopRules(9, 100), priority=priority)
        self.roster.number(request)
        self.roster.enter(request)
        return request

    def step(self, costs: StepCosts = STREAMED) -> StepPlan:
        plan = self.planner.next_plan(now=0.0, paused=False)
        assert plan is not None
        self.planner.answer(StepResult(plan.step_id, (), (), (), {}, self.snapshot(costs), 0.0))
        return plan

    def leave(self, rid: str) -> None:
        request = self.roster.live[rid]
        self.roster.finish(request, aborted("done"), known_to_worker=True)
        self.planner.drop(request)

    def next_admitted(self, costs: StepCosts = STREAMED) -> list[str]:
        """Whom a place that gets free is given to."""
        self.leave(self.roster.running[0].rid)
        waiting = {request.rid for request in self.roster.queue}
        return [row.rid for row in self.step(costs).rows if row.rid in waiting]


def test_a_free_place_is_for_who_is_alike_and_the_overtaken_is_counted() -> None:
    desk = Desk()
    first, second = desk.add("first", HIGH), desk.add("second", LOW)
    assert desk.next_admitted() == ["second"]
    assert (first.num_overtaken, second.num_overtaken) == (1, 0)
    assert desk.next_admitted() == ["first"]
    assert desk.planner.num_out_of_turn == 1


def test_the_queue_is_served_in_order_where_it_is_not_asked_for_or_nothing_is_loaded() -> None:
    for desk, costs in ((Desk(affinity=False), STREAMED), (Desk(), StepCosts())):
        desk.step(costs)
        first = desk.add("first", HIGH)
        desk.add("second", LOW)
        assert desk.next_admitted() == ["first"]
        assert first.num_overtaken == 0


@pytest.mark.parametrize("order", ["lof", "random"])
def test_another_policy_has_its_own_order(order: str) -> None:
    with_it, without = Desk(order=order), Desk(order=order, affinity=False)
    for desk in (with_it, without):
        for rid, prompt in (("a", HIGH), ("b", LOW), ("c", HIGH), ("d", LOW)):
            desk.add(rid, prompt)
    assert with_it.next_admitted() == without.next_admitted()


def test_nobody_overtakes_another_priority() -> None:
    desk = Desk(use_priority=True)
    desk.add("low value", HIGH, priority=-1)
    desk.add("like the others", LOW, priority=1)
    desk.add("like them too", LOW, priority=1)
    desk.leave("run 1")
    assert desk.next_admitted() == ["low value", "like the others"]


def test_nobody_is_overtaken_more_often_than_so() -> None:
    desk = Desk()
    first = desk.add("first", HIGH)
    for number in range(MOST_OVERTAKEN):
        desk.add(str(number), LOW)
        assert desk.next_admitted() == [str(number)]
    desk.add("one more", LOW)
    assert desk.next_admitted() == ["first"]
    assert first.num_overtaken == MOST_OVERTAKEN
