"""Later gates asked early: 4 layers of 4 experts, whose gates read 4 numbers and repeat them."""

from typing import Any

import numpy as np
import pytest

from sglmoe.prediction.predictor import LayerRouting, ModelParts, StepTokens
from sglmoe.prediction.pregate import DOUBT, Pregate, choice_margins
from sglmoe.prediction.router import Router

PARTS = ModelParts(num_layers=4, num_experts=4, top_k=2)
GATES = np.tile(np.eye(4, dtype=np.float32), (4, 1, 1))


def pregate(gates: np.ndarray = GATES, **options: Any) -> Pregate:
    rule = {name: options.pop(name) for name in ("num_groups", "top_groups") if name in options}
    return Pregate(PARTS, Router(gates, 2, **rule), **options)


def observe(predictor: Pregate, layer: int, *hidden: list[float]) -> np.ndarray:
    """The scores after `layer` has read this, a row a token."""
    array = np.array(hidden, np.float32)
    begin(predictor, len(array))
    predictor.observe(routing(layer, array))
    return predictor.scores()


def begin(predictor: Pregate, num_tokens: int) -> None:
    zeros = np.zeros(num_tokens, np.int32)
    predictor.begin_step(StepTokens(zeros, zeros, zeros))


def routing(layer: int, hidden: np.ndarray) -> LayerRouting:
    nothing = np.zeros((len(hidden), 0))
    return LayerRouting(layer, nothing, nothing, hidden)


def logistic(margin: float) -> float:
    return float(1 / (1 + np.exp(-margin)))


def test_the_top_k_are_likelier_than_not_and_the_others_the_less_the_farther_they_are_off() -> None:
    scores = observe(pregate(), 0, [4, 1, 3, 2])[1]
    spread = np.std([4, 1, 3, 2]) * DOUBT
    expected = [logistic((logit - 3) / spread) for logit in (4, 1, 3, 2)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)
    assert scores[2] == 0.5


def test_only_layers_ahead_are_predicted_as_far_as_the_horizon() -> None:
    assert observe(pregate(), 1, [4, 1, 3, 2]).any(axis=1).tolist() == [False, False, True, True]
    near = observe(pregate(horizon=1), 0, [4, 1, 3, 2])
    assert near.any(axis=1).tolist() == [False, True, False, False]


def test_each_layer_is_asked_by_its_own_gate() -> None:
    gates = GATES.copy()
    gates[2] = GATES[2][::-1]
    scores = observe(pregate(gates), 0, [4, 1, 3, 2])
    assert scores[1].argmax() == 0
    assert scores[2].argmax() == 3


def test_nothing_is_predicted_before_the_first_layer_and_after_the_last() -> None:
    predictor = pregate()
    assert not observe(predictor, 3, [4, 1, 3, 2]).any()
    observe(predictor, 0, [4, 1, 3, 2])
    begin(predictor, 1)
    assert not predictor.scores().any()


def test_doubt_grows_with_distance() -> None:
    scores = observe(pregate(), 0, [4, 1, 3, 2])
    assert scores[1, 0] > scores[2, 0] > scores[3, 0] > 0.5
    assert scores[1, 3] < scores[2, 3] < scores[3, 3] < 0.5
    assert scores[3, 0] == pytest.approx(
        logistic(1 / (np.std([4, 1, 3, 2]) * DOUBT * np.sqrt(3))), rel=1e-5
    )


def test_gates_of_another_scale_say_the_same() -> None:
    hidden = [4.0, 1, 3, 2]
    np.testing.assert_allclose(
        observe(pregate(100 * GATES), 0, hidden), observe(pregate(), 0, hidden), rtol=1e-5
    )


def test_one_token_that_wants_an_expert_is_enough() -> None:
    one, other = [9.0, 8, 0, 0], [0.0, 8, 9, 0]
    alone = [observe(pregate(), 0, token) for token in (one, other)]
    both = observe(pregate(), 0, one, other)
    np.testing.assert_allclose(both, 1 - (1 - alone[0]) * (1 - alone[1]), rtol=1e-5)


def test_evenly_spaced_tokens_stand_for_all() -> None:
    first, last = [9.0, 8, 0, 0], [2.0, 3, 3.5, 0]
    scores = observe(pregate(max_tokens=1), 0, first, last)
    alone = observe(pregate(), 0, last)
    np.testing.assert_allclose(scores, 1 - (1 - alone) ** 2, rtol=1e-5)


def test_a_group_that_is_out_is_not_predicted() -> None:
    scores = observe(pregate(num_groups=2, top_groups=1), 0, [9, 0, 8, 7])
    assert (scores[1] > 0).tolist() == [True, True, False, False]
    assert scores[1, 1] == 0.5


def test_scores_handed_out_stay_as_they_were() -> None:
    predictor = pregate()
    before = observe(predictor, 0, [4, 1, 3, 2])
    kept = before.copy()
    predictor.observe(routing(1, np.array([[1, 2, 3, 4]], np.float32)))
    assert (before == kept).all()


def test_half_precision_inputs_give_float32_scores() -> None:
    predictor = pregate()
    begin(predictor, 1)
    predictor.observe(routing(0, np.array([[4, 1, 3, 2]], np.float16)))
    assert predictor.scores().dtype == np.float32
    assert (predictor.scores() == observe(pregate(), 0, [4, 1, 3, 2])).all()


def test_a_token_without_preferences_gives_no_nan() -> None:
    margins = choice_margins(Router(GATES, 2), np.zeros((1, 4), np.float32), slice(0, 4))
    assert (margins == 0).all()
