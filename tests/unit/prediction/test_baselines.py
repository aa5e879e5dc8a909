"""Predictors that learn nothing, or count. 2 layers of 4 experts, 2 of which a token uses."""

from typing import Any

import numpy as np
import pytest

from sglmoe.prediction import baselines
from sglmoe.prediction.baselines import Frequency, LastStep, PreviousLayer
from sglmoe.prediction.predictor import LayerRouting, ModelParts, Predictor, StepTokens

PARTS = ModelParts(num_layers=2, num_experts=4, top_k=2)


def begin(predictor: Predictor, owners: list[int]) -> None:
    array = np.array(owners, np.int32)
    predictor.begin_step(StepTokens(np.zeros_like(array), np.zeros_like(array), array))


def observe(predictor: Predictor, layer: int, expert_ids: list[list[int]]) -> None:
    ids = np.array(expert_ids, np.uint8)  # as in traces
    predictor.observe(LayerRouting(layer, ids, np.zeros((len(ids), 4), np.float16)))


def step(predictor: Predictor, owners: list[int], *layers: list[list[int]]) -> None:
    begin(predictor, owners)
    for layer, expert_ids in enumerate(layers):
        observe(predictor, layer, expert_ids)


def scores(predictor: Predictor) -> list[list[float]]:
    rows: list[list[float]] = predictor.scores().tolist()
    return rows


def is_nothing(predictor: Predictor) -> bool:
    return not predictor.scores().any()


# What a request's last token used.


def test_last_step_predicts_what_the_last_token_used() -> None:
    predictor = LastStep(PARTS)
    # A prompt of two tokens: the first one's experts don't count.
    step(predictor, [7, 7], [[0, 1], [1, 2]], [[0, 1], [3, 0]])
    begin(predictor, [7])
    assert scores(predictor) == [[0, 0.5, 0.5, 0], [0.5, 0, 0, 0.5]]


def test_last_step_knows_nothing_of_a_new_request() -> None:
    predictor = LastStep(PARTS)
    step(predictor, [7], [[0, 1]], [[0, 1]])
    begin(predictor, [8])
    assert is_nothing(predictor)


def test_last_step_is_surer_the_more_requests_agree() -> None:
    predictor = LastStep(PARTS)
    step(predictor, [7, 8], [[0, 1], [1, 2]], [[0, 1], [0, 1]])
    begin(predictor, [7, 8, 9])  # 9 is new
    assert scores(predictor) == [[0.5, 0.75, 0.5, 0], [0.75, 0.75, 0, 0]]


def test_last_step_waits_for_requests_that_pause() -> None:
    predictor = LastStep(PARTS)
    step(predictor, [7, 8], [[0, 1], [2, 3]], [[0, 1], [2, 3]])
    step(predictor, [8], [[0, 1]], [[0, 1]])
    begin(predictor, [7])
    assert scores(predictor) == [[0.5, 0.5, 0, 0]] * 2


def test_last_step_predicts_later_layers_from_the_step_before_while_this_one_runs() -> None:
    predictor = LastStep(PARTS)
    step(predictor, [7], [[0, 1]], [[0, 1]])
    begin(predictor, [7])
    observe(predictor, 0, [[2, 3]])
    assert scores(predictor)[1] == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("runs", [False, True])
def test_last_step_forgets(runs: bool) -> None:
    """A request that ends while its step runs must not come back when the step goes on."""
    predictor = LastStep(PARTS)
    step(predictor, [7], [[0, 1]], [[0, 1]])
    if runs:
        begin(predictor, [7])
        predictor.forget(7)
        observe(predictor, 0, [[0, 1]])
    else:
        predictor.forget(7)
    begin(predictor, [7])  # the number was given to another request
    assert is_nothing(predictor)


def test_last_step_forgets_those_idle_longest_if_nobody_tells_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(baselines, "MAX_OWNERS", 2)
    predictor = LastStep(PARTS)
    for owner in (1, 2, 1, 3):
        step(predictor, [owner], [[0, 1]], [[0, 1]])
    begin(predictor, [2])
    assert is_nothing(predictor)


# How often tokens use an expert.


def test_frequency_is_the_share_of_tokens() -> None:
    predictor = Frequency(PARTS, half_life_tokens=1e9)
    step(predictor, [1, 1, 1, 1], [[0, 1], [0, 2], [0, 1], [0, 3]], [[0, 1]] * 4)
    begin(predictor, [1])
    assert predictor.scores() == pytest.approx(np.array([[1, 0.5, 0.25, 0.25], [1, 1, 0, 0]]))


def test_frequency_of_any_of_several_tokens() -> None:
    predictor = Frequency(PARTS, half_life_tokens=1e9)
    step(predictor, [1, 1, 1, 1], [[0, 1], [0, 2], [0, 1], [0, 3]], [[0, 1]] * 4)
    begin(predictor, [1, 2])
    # 1 - 0.5^2, 1 - 0.75^2
    assert predictor.scores()[0].tolist() == pytest.approx([1, 0.75, 0.4375, 0.4375])


def test_frequency_forgets_old_tokens() -> None:
    predictor = Frequency(PARTS, half_life_tokens=4)
    step(predictor, [1] * 4, [[0, 1]] * 4, [[0, 1]] * 4)
    step(predictor, [1] * 4, [[2, 3]] * 4, [[0, 1]] * 4)
    begin(predictor, [1])
    # The first four count 2, the others 4.
    assert predictor.scores()[0].tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])


# Which experts go with those of the layer before.


def test_previous_layer_learns_what_goes_together() -> None:
    predictor = PreviousLayer(PARTS)
    for _ in range(3):
        step(predictor, [1], [[0, 1]], [[2, 3]])
        step(predictor, [1], [[2, 3]], [[0, 1]])
    begin(predictor, [1])
    observe(predictor, 0, [[0, 1]])
    # After 0 and after 1: 2 and 3, three times out of three, and once nothing.
    assert scores(predictor)[1] == pytest.approx([0, 0, 0.75, 0.75])


def test_previous_layer_takes_the_mean_of_a_tokens_experts() -> None:
    predictor = PreviousLayer(PARTS)
    for _ in range(3):
        step(predictor, [1], [[0, 1]], [[2, 3]])
    begin(predictor, [1])
    observe(predictor, 0, [[0, 2]])  # nothing is known of 2
    assert scores(predictor)[1] == pytest.approx([0, 0, 0.375, 0.375])


def test_previous_layer_of_any_of_two_tokens() -> None:
    predictor = PreviousLayer(PARTS)
    step(predictor, [1], [[0, 1]], [[2, 3]])
    begin(predictor, [1, 2])
    observe(predictor, 0, [[0, 1], [0, 1]])
    # Each with 1 / 2.
    assert scores(predictor)[1] == pytest.approx([0, 0, 0.75, 0.75])


def test_previous_layer_pairs_tokens_with_themselves() -> None:
    predictor = PreviousLayer(PARTS)
    step(predictor, [1, 2], [[0, 1], [2, 3]], [[0, 1], [2, 3]])
    begin(predictor, [1])
    observe(predictor, 0, [[0, 1]])
    assert scores(predictor)[1] == pytest.approx([0.5, 0.5, 0, 0])


def test_previous_layer_has_nothing_before_the_first_layer_and_after_the_last() -> None:
    predictor = PreviousLayer(PARTS)
    step(predictor, [1], [[0, 1]], [[2, 3]])
    assert is_nothing(predictor)
    begin(predictor, [1])
    assert is_nothing(predictor)


def test_previous_layer_predicts_from_the_last_layer_observed() -> None:
    predictor = PreviousLayer(ModelParts(num_layers=3, num_experts=4, top_k=2))
    # The third layer follows the second one, whatever the first one did.
    for first in ([0, 1], [2, 3]):
        step(predictor, [1], [first], [[0, 1]], [[0, 1]])
        step(predictor, [1], [first], [[2, 3]], [[2, 3]])
    begin(predictor, [1])
    observe(predictor, 0, [[0, 1]])
    assert scores(predictor)[2] == pytest.approx([1 / 3] * 4)
    observe(predictor, 1, [[0, 1]])
    assert scores(predictor)[2] == pytest.approx([2 / 3, 2 / 3, 0, 0])


def test_previous_layer_does_not_pair_steps() -> None:
    predictor = PreviousLayer(PARTS)
    step(predictor, [1], [[0, 1]])  # failed after its first layer
    step(predictor, [1], [[2, 3]], [[0, 1]])
    begin(predictor, [1])
    observe(predictor, 0, [[0, 1]])
    assert is_nothing(predictor)


def test_previous_layer_sees_no_farther_than_its_distance() -> None:
    predictor = PreviousLayer(ModelParts(num_layers=3, num_experts=4, top_k=2), max_distance=1)
    step(predictor, [1], [[0, 1]], [[0, 1]], [[0, 1]])
    begin(predictor, [1])
    observe(predictor, 0, [[0, 1]])
    assert scores(predictor)[1:] == [[0.5, 0.5, 0, 0], [0, 0, 0, 0]]


def test_previous_layer_forgets_old_habits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MAX_USES", 8)
    predictor = PreviousLayer(PARTS)
    for _ in range(50):
        step(predictor, [1], [[0, 1]], [[0, 1]])
    for _ in range(10):
        step(predictor, [1], [[0, 1]], [[2, 3]])
    begin(predictor, [1])
    observe(predictor, 0, [[0, 1]])
    likely = predictor.scores()[1]
    assert likely[2] > 0.5 > likely[0]


def test_previous_layer_is_bounded_whatever_the_model() -> None:
    assert PreviousLayer(ModelParts(48, 128, 8)).max_distance == 8
    assert PreviousLayer(ModelParts(48, 512, 10)).max_distance == 2


@pytest.mark.parametrize("make", [LastStep, Frequency, PreviousLayer])
def test_scores_once_given_do_not_change(make: Any) -> None:
    """Whoever calibrates keeps them until the layer has run."""
    predictor: Predictor = make(PARTS)
    step(predictor, [1], [[0, 1]], [[2, 3]])
    begin(predictor, [1])
    observe(predictor, 0, [[0, 1]])
    kept = predictor.scores()
    before = kept.copy()
    observe(predictor, 1, [[1, 2]])
    step(predictor, [1], [[1, 2]], [[2, 3]])
    assert kept.tolist() == before.tolist()
    assert kept.dtype == np.float32
