"""Figures of predictors whose quality is known."""

import numpy as np
from tiny_traces import NUM_EXPERTS, NUM_LAYERS, experts_of, random_trace, trace_of

from sglmoe.prediction.predictor import LayerRouting, ModelParts, Scores, StepTokens
from sglmoe.prediction.training_data import TracePart
from sglmoe.prediction.training_report import Figures, compare, mean_of, measure, steps_of, table


class Knowing:
    """Scores of 1 for what the step will use; reversed: for what it won't."""

    wants_gate_input = False
    wants_probabilities = False

    def __init__(self, parts: ModelParts, *, is_wrong: bool = False):
        self._is_wrong = is_wrong
        self._scores: Scores = np.zeros((parts.num_layers, parts.num_experts), np.float32)
        self.forgotten: list[int] = []
        self.steps: list[StepTokens] = []

    def begin_step(self, tokens: StepTokens) -> None:
        self.steps.append(tokens)
        used = np.zeros((NUM_LAYERS, NUM_EXPERTS), np.float32)
        for layer, chosen in enumerate(experts_of(tokens.token_ids).swapaxes(0, 1)):
            used[layer, chosen] = 1
        self._scores = 1 - used if self._is_wrong else used

    def observe(self, routing: LayerRouting) -> None: ...

    def scores(self) -> Scores:
        return self._scores

    def forget(self, owner: int) -> None:
        self.forgotten.append(owner)


class Shortsighted(Knowing):
    """Knows the next layer only."""

    def begin_step(self, tokens: StepTokens) -> None:
        super().begin_step(tokens)
        self._next_layer = 0

    def observe(self, routing: LayerRouting) -> None:
        self._next_layer = routing.layer + 1

    def scores(self) -> Scores:
        is_next = np.arange(NUM_LAYERS)[:, np.newaxis] == self._next_layer
        return np.where(is_next, super().scores(), np.float32(0))


def whole(*, num_requests: int) -> TracePart:
    trace = random_trace(num_requests, seed=3)
    return TracePart("tiny", trace, np.ones(num_requests, bool))


def test_who_knows_everything_is_always_right() -> None:
    decode, prefill = measure("knowing", Knowing, whole(num_requests=4))
    assert (decode.kind, prefill.kind, prefill.num_steps) == ("decode", "prefill", 2)
    for its in (decode.overall, *decode.by_layer, *decode.by_distance):
        assert (its.accuracy, its.precision, its.recall, its.calibration_error) == (1, 1, 1, 0)
    assert (len(decode.by_layer), len(decode.by_distance)) == (2, 2)


def test_who_is_always_wrong_is_never_right() -> None:
    part = whole(num_requests=4)
    wrong = [
        m for m in measure("w", lambda p: Knowing(p, is_wrong=True), part) if m.kind == "decode"
    ]
    figures = wrong[0].overall
    assert (figures.accuracy, figures.precision, figures.recall) == (0, 0, 0)
    assert figures.calibration_error == 1


def test_predictions_count_by_how_many_layers_ahead_they_were_made() -> None:
    decode, _ = measure("shortsighted", Shortsighted, whole(num_requests=4))
    assert [its.accuracy for its in decode.by_distance] == [1, 0]
    # Layer 1 is predicted twice: before layer 0, wrongly, and after it.
    assert [its.accuracy for its in decode.by_layer] == [1, 0.5]
    assert decode.overall.accuracy == 0.75


def test_a_mean_is_of_what_there_is() -> None:
    figures = [Figures(1.0, None, 0.5, None), Figures(0.0, None, None, 0.25)]
    assert mean_of(figures) == Figures(0.5, None, 0.5, 0.25)


def test_only_the_requests_that_count_are_shown_and_each_is_forgotten_once() -> None:
    part = whole(num_requests=4)
    part.requests[[0, 3]] = False
    predictors = []

    def new(parts: ModelParts) -> Knowing:
        predictors.append(Knowing(parts))
        return predictors[-1]

    measure("knowing", new, part)
    (its,) = predictors
    assert its.forgotten == [1, 2]
    shown = np.concatenate([step.owners for step in its.steps])
    assert set(shown.tolist()) == {1, 2}
    assert len(shown) == part.num_tokens


def test_a_step_with_more_than_one_token_of_a_request_is_prefill() -> None:
    trace = trace_of([[(0, 0, [1, 2]), (1, 0, [3])], [(0, 2, [4]), (1, 1, [5])]])
    first, second = steps_of(TracePart("tiny", trace, np.ones(2, bool)))
    assert (first.is_decode, second.is_decode) == (False, True)
    # Tokens 1 to 3 use experts 1 to 3 and 0; in layer 1 one further. 4 and 5: 0 1 2, then 1 2 3.
    assert first.used(NUM_EXPERTS).tolist() == [[True] * 4, [True] * 4]
    assert second.used(NUM_EXPERTS)[0].tolist() == [True, True, True, False]
    assert (first.ended, second.ended) == ([], [0, 1])


def test_the_table_has_baselines_beside_the_predictor() -> None:
    lines = table(compare("knowing", Knowing, [whole(num_requests=4)])).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2][2:6] == ["knowing", "100.0", "100.0 100.0", "100.0 100.0"]
    assert [row[1].split()[1] for row in cells[2:]] == ["decode", "prefill"] * 3
    assert [row[2] for row in cells[2:]] == [
        name for name in ("knowing", "last_step", "frequency") for _ in range(2)
    ]
    assert {len(row) for row in cells} == {9}
