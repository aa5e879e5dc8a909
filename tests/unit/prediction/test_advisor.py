"""Advice on 2 layers of 4 experts: who is heard, whose plans are given, what is said of them."""

from collections.abc import Callable

import numpy as np
import pytest

from sglmoe.memory.experts import ABSENT
from sglmoe.memory.layer_streaming import BULK_TOKENS
from sglmoe.memory.prefetch import Wanted
from sglmoe.prediction.advisor import AUDITION_STEPS, Advisor, LinkTimes
from sglmoe.prediction.predictor import LayerRouting, Predictor, Scores, StepTokens

TIMES = LinkTimes(expert_seconds=0.0015, layer_seconds=0.001)  # one load a plan
ALL_ABSENT = np.ones(4, np.bool_)


class Fixed:
    """Always says the same, and keeps what it is told."""

    def __init__(self, *likely: tuple[int, int], wants_gate_input: bool = False):
        self.wants_gate_input = self.wants_probabilities = wants_gate_input
        self.log: list[str] = []
        self._scores: Scores = np.full((2, 4), 0.01, np.float32)
        for key in likely:
            self._scores[key] = 1.0

    def begin_step(self, tokens: StepTokens) -> None:
        self.log.append(f"step of {tokens.num_tokens}")

    def observe(self, routing: LayerRouting) -> None:
        self.log.append(f"layer {routing.layer}")

    def scores(self) -> Scores:
        return self._scores

    def forget(self, owner: int) -> None:
        self.log.append(f"forget {owner}")


def tokens(num_tokens: int = 1) -> StepTokens:
    zeros = np.zeros(num_tokens, np.int32)
    return StepTokens(zeros, zeros, zeros)


class Bench:
    def __init__(self, *, fallback: Callable[[], Predictor] | None = None, **predictors: Predictor):
        self.frame_table = np.full((2, 4), ABSENT, np.int32)
        self.bulk = Fixed((0, 3))
        self.advisor = Advisor(
            predictors, self.bulk, frame_table=self.frame_table, fallback=fallback
        )
        self.num_steps = 0

    def begin(self, num_tokens: int = 1) -> None:
        self.num_steps += 1
        self.advisor.begin_step(self.num_steps, tokens(num_tokens), TIMES, late=0, unused=0)

    def observe(self, layer: int, *experts: int, absent: np.ndarray = ALL_ABSENT) -> None:
        routing = LayerRouting(layer, np.array([experts]), np.full((1, 4), 0.25, np.float32))
        self.advisor.observe(routing, was_absent=absent)

    def steps(self, count: int) -> None:
        """Both layers use their expert 3."""
        for _ in range(count):
            self.begin()
            self.advisor.outlook()
            self.observe(0, 3)
            self.advisor.outlook()
            self.observe(1, 3)
            self.advisor.outlook()

    def wanted(self) -> list[tuple[int, int]]:
        return [(its.layer, its.expert) for its in self.advisor.outlook().wanted]


def test_what_has_come_true_is_wanted() -> None:
    bench = Bench(only=Fixed((0, 3), (1, 2), (1, 3)))
    bench.begin()
    assert bench.advisor.outlook().wanted == [], "nothing is known of such scores"
    bench.steps(50)
    bench.begin()
    assert bench.wanted() == [(0, 3)], "of two layers one is looked ahead"
    bench.observe(0, 3)
    outlook = bench.advisor.outlook()
    assert (outlook.step, outlook.layer) == (52, 0)
    assert outlook.probabilities[1, 2:] == pytest.approx(2 / 3, abs=0.1), (
        "of three scores two were right"
    )
    [its] = outlook.wanted
    assert its == Wanted(1, 2, pytest.approx(2 / 3, abs=0.1)), (
        "as likely as 3, and the lower number"
    )


def test_residents_are_not_wanted() -> None:
    bench = Bench(only=Fixed((0, 2), (0, 3), (1, 3)))
    bench.steps(50)
    bench.frame_table[0, 2] = 5
    bench.begin()
    assert bench.wanted() == [(0, 3)]


def test_after_the_last_layer_it_is_of_the_next_step() -> None:
    bench = Bench(only=Fixed((0, 3), (1, 3)))
    bench.steps(50)
    bench.begin()
    bench.observe(0, 3)
    bench.observe(1, 3)
    assert bench.wanted() == [(0, 3)]


def test_of_a_layer_that_one_says_nothing_of_the_fallback_speaks() -> None:
    silent = Fixed((1, 3))
    silent._scores[0] = 0  # like a gate that has no layer before it
    bench = Bench(only=silent, fallback=lambda: Fixed((0, 3), (1, 2)))
    bench.steps(50)
    bench.begin()
    assert bench.wanted() == [(0, 3)]
    bench.observe(0, 3)
    assert bench.wanted() == [(1, 3)]


def test_the_one_whose_plans_were_most_use_is_picked() -> None:
    right, wrong = Fixed((0, 3), (1, 3)), Fixed((0, 2), (1, 2), wants_gate_input=True)
    bench = Bench(wrong=wrong, right=right)
    bench.steps(AUDITION_STEPS)
    assert bench.advisor.picked is None
    assert bench.advisor.wants_gate_input
    assert bench.advisor.wants_probabilities
    heard = len(wrong.log)
    bench.steps(1)
    assert bench.advisor.picked == "right"
    assert not bench.advisor.wants_gate_input
    assert not bench.advisor.wants_probabilities
    assert len(wrong.log) == heard, "nobody listens to it any more"
    assert bench.advisor.pick_reason.startswith("misses that plans would have prevented: wrong 0%")
    scores = bench.advisor.scores()
    assert scores["right"].coverage > 0.9
    assert scores["wrong"].useful == 0


def test_only_misses_count() -> None:
    bench = Bench(only=Fixed((0, 3), (1, 3)))
    bench.steps(50)
    before = bench.advisor.scores()["only"].missed
    bench.begin()
    bench.advisor.outlook()
    bench.observe(0, 3, absent=np.array([True, True, True, False]))
    assert bench.advisor.scores()["only"].missed == before


def test_in_a_step_of_many_tokens_frequencies_speak() -> None:
    only = Fixed((0, 0), (1, 1))
    bench = Bench(only=only)
    for _ in range(50):
        bench.begin(BULK_TOKENS + 1)
        bench.observe(0, 3)
        bench.observe(1, 3)
    bench.begin(BULK_TOKENS + 1)
    assert bench.wanted() == [(0, 3)]
    assert set(only.log) == {f"step of {BULK_TOKENS + 1}"}, "its prompt, not its routing"
    assert bench.advisor.scores()["only"].missed == 0
    bench.begin()
    assert "step of 1" not in bench.bulk.log


def test_plans_made_before_a_step_of_many_tokens_are_forgotten() -> None:
    bench = Bench(only=Fixed((0, 3), (1, 3)))
    bench.steps(50)  # the last thing said: 0.3 will be used next
    bench.begin(BULK_TOKENS + 1)
    bench.observe(0, 1)
    bench.observe(1, 1)
    before = bench.advisor.scores()["only"].planned
    bench.begin()
    bench.observe(0, 3)
    assert bench.advisor.scores()["only"].planned == before


def test_quality_is_measured_now_and_then() -> None:
    bench = Bench(only=Fixed((0, 3), (1, 3)))
    bench.steps(200)
    quality = bench.advisor.quality()
    assert quality.num_predictions == 2 * 200 // 8
    assert quality.recall is not None
    assert quality.recall > 0.9
    assert bench.advisor.quality(layer=0).num_predictions == 200 // 8


def test_all_forget_who_has_ended() -> None:
    one, other = Fixed(), Fixed()
    bench = Bench(one=one, other=other)
    bench.advisor.forget(7)
    assert one.log == other.log == bench.bulk.log == ["forget 7"]


def test_late_and_unused_arrivals_move_the_horizon() -> None:
    bench = Bench(only=Fixed((0, 0)))
    before = bench.advisor.horizon.layers
    for _ in range(20):
        bench.num_steps += 1
        bench.advisor.begin_step(bench.num_steps, tokens(), TIMES, late=0, unused=5)
    assert bench.advisor.horizon.layers == before == 1
    assert bench.advisor.horizon.history[-1].correction <= 0
