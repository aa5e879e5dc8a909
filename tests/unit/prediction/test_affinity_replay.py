"""Requests of a trace in other company: nothing of them is lost or changed, and what is counted is what was run.

Traces of the tiny model: 2 layers of 4 experts; token t takes experts t and t + 1, one further in the second layer.
"""

import numpy as np
import pytest
from tiny_traces import Row, random_trace, trace_of

from eval.affinity_replay import SCHEMES, Machine, count, queue_of
from eval.batch_schedules import (
    Library,
    Schedule,
    Scheme,
    as_trace,
    courses_of,
    library_of,
    schedule,
)
from eval.replay_predictors import NextPlan
from sglmoe.prediction.predictor import LayerRouting, StepTokens

TRACE = random_trace(12, seed=3)


def run(library: Library, scheme: Scheme, num_running: int) -> Schedule:
    return schedule(library, queue_of(library, 1, 0), scheme, num_running=num_running, seed=0)


def decoded(made: Schedule) -> list[int]:
    """Rows of each decode step."""
    return [len(its.rows) for its in made.passes if its.is_decode]


def test_a_course_is_a_request_by_position() -> None:
    """Request 0 is computed in one piece and decodes twice; request 1 loses its KV and is computed again."""
    trace = trace_of(
        [
            [(0, 0, [5, 6]), (1, 0, [7, 8, 9])],
            [(0, 2, [1]), (1, 3, [2])],
            [(1, 0, [7, 8, 9, 2])],
            [(0, 3, [3]), (1, 4, [4])],
        ]
    )
    first, second = courses_of(trace)
    assert trace.token_ids[first.tokens].tolist() == [5, 6, 1, 3]
    assert trace.token_ids[second.tokens].tolist() == [7, 8, 9, 2, 4]
    assert (first.num_prompt, second.num_prompt) == (2, 3)
    assert first.tokens.tolist() == [0, 1, 5, 11]
    assert second.tokens.tolist() == [7, 8, 9, 10, 12]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_requests_are_computed_whole_and_in_order(scheme: Scheme) -> None:
    library = library_of([TRACE])
    made = run(library, scheme, num_running=4)
    computed: dict[str, list[int]] = {}
    for its in made.passes:
        for rid, tokens in its.rows:
            computed.setdefault(rid, []).extend(tokens.tolist())
    starts = {course.tokens[0]: course.tokens.tolist() for course in library.courses}
    assert len(computed) == len(library.courses), "the queue was not served to its end"
    for tokens in computed.values():
        assert tokens == starts[tokens[0]][: len(tokens)]


def test_halves_take_turns_and_nobody_waits_longer() -> None:
    library = library_of([TRACE])
    together = run(library, Scheme("together"), num_running=4)
    halves = run(library, Scheme("halves", turn_steps=1), num_running=4)
    assert set(decoded(together)) == {4}
    assert np.mean(decoded(halves)) == pytest.approx(2, abs=0.2)
    assert max(decoded(halves)) <= 3, "someone came in between"
    assert len(decoded(halves)) == pytest.approx(2 * len(decoded(together)), rel=0.2)


def library_from(texts: list[list[int]]) -> Library:
    """All at once: prompts of two tokens, then one by one."""
    steps: list[list[Row]] = [[(owner, 0, text[:2]) for owner, text in enumerate(texts)]]
    for place in range(2, max(map(len, texts))):
        present = [owner for owner, text in enumerate(texts) if place < len(text)]
        steps.append([(owner, place, [texts[owner][place]]) for owner in present])
    return library_of([trace_of(steps)])


# Four requests; the first and the third keep to tokens 0 and 4, which take experts 0 and 1 (then 1 and 2).
TEXTS = [[0, 4, 0, 4, 0], [2, 6, 2, 6, 2], [4, 0, 4, 0, 4], [6, 2, 6, 2, 6]]


@pytest.mark.parametrize(("split_by", "most"), [("affinity", 8), ("chance", 16)])
def test_foreseen_halves_take_what_the_objective_says(split_by: str, most: int) -> None:
    """All take eight experts, halves that are alike four each; by chance halves may take eight each."""
    scheme = Scheme("halves", turn_steps=1, window=0, split_by=split_by)
    library = library_from(TEXTS)
    made = run(library, scheme, num_running=4)
    # The prompts, two rounds, and a first half that ends with the queue empty.
    assert decoded(made) == [2, 2, 2, 2, 2]
    two_rounds = Schedule(made.passes[:5], made.foreseen[:2])
    counts = count(library, two_rounds, num_frames=8)
    assert [together for together, _ in two_rounds.foreseen] == [8, 8]
    assert sum(halves for _, halves in two_rounds.foreseen) == counts.activated
    assert max(halves for _, halves in two_rounds.foreseen) <= most
    assert counts.tokens == 8


def test_only_what_decode_steps_load_counts() -> None:
    """Prompts load all eight; with eight frames nothing is loaded after that, with two in turn all of it."""
    library = library_from(TEXTS)
    made = run(library, Scheme("together"), num_running=4)
    assert count(library, made, num_frames=8)[:4] == (3, 12, 24, 0)
    assert count(library, made, num_frames=3).misses > 12


def test_who_is_alike_is_admitted_first() -> None:
    """Two run, and the first of them ends. Of two that wait the later one has the words of the other that runs."""
    library = library_from([[0, 4, 0], [0, 4, 4, 0, 4], [2, 6, 2], [4, 0, 0]])
    firsts = [int(course.tokens[0]) for course in library.courses]
    orders = {}
    for admit in ("queue", "words", "experts"):
        scheme = Scheme("", admit=admit)
        made = schedule(library, list(library.courses), scheme, num_running=2, seed=0)
        rows = [row for its in made.passes if not its.is_decode for row in its.rows]
        orders[admit] = [firsts.index(int(tokens[0])) for _, tokens in rows]
    assert orders == {"queue": [0, 1, 2, 3], "words": [0, 1, 3, 2], "experts": [0, 1, 3, 2]}


def test_a_schedule_is_a_trace() -> None:
    library = library_of([TRACE])
    made = run(library, Scheme("together"), num_running=4)
    trace = as_trace(library, made)
    assert trace.num_steps == len(made.passes)
    for its, start, stop in zip(
        made.passes, trace.step_bounds, trace.step_bounds[1:], strict=False
    ):
        tokens = np.concatenate([tokens for _, tokens in its.rows])
        assert trace.token_ids[start:stop].tolist() == TRACE.token_ids[tokens].tolist()
        assert trace.expert_ids[start:stop].tolist() == TRACE.expert_ids[tokens].tolist()
        owners = [int(rid) for rid, tokens in its.rows for _ in tokens]
        assert trace.owners[start:stop].tolist() == owners


def test_seconds_are_passes_and_loads_or_the_longer_of_the_two() -> None:
    """Two layers of 1 ms; five loads of 1000 bytes in three groups of 0.5 ms."""
    machine = Machine(2, 1e-3, 0.5e-3, 1000)
    library = library_from(TEXTS)
    counts = count(library, run(library, Scheme("together"), 4), 8)
    counts = counts._replace(passes=2, tokens=8, misses=5, loads=3)
    waited, hidden = machine.seconds(counts, bytes_per_second=1e6)
    assert waited == pytest.approx((4e-3 + 6.5e-3) / 8)
    assert hidden == pytest.approx(6.5e-3 / 8)


def test_who_is_in_the_next_plan_is_foreseen_by_what_they_used_last() -> None:
    """Two requests in turn. After the second one's step the first is next, whose token 1 took experts 1 and 2, then 2 and 3."""
    trace = trace_of([[(0, 0, [1])], [(1, 0, [5])], [(0, 1, [3])], [(1, 1, [5])]])
    predictor = NextPlan(trace)
    for step in range(2):
        place = slice(step, step + 1)
        predictor.begin_step(
            StepTokens(trace.token_ids[place], trace.positions[place], trace.owners[place])
        )
        for layer in range(2):
            routing = LayerRouting(
                layer, trace.expert_ids[place, layer], trace.probabilities[place, layer]
            )
            predictor.observe(routing)
    foreseen = [np.flatnonzero(scores).tolist() for scores in predictor.scores()]
    assert foreseen == [[1, 2], [2, 3]]
