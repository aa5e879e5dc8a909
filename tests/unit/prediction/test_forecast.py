"""A predictor's scores become probabilities: 2 layers of 2 experts, a token a step."""

from typing import Any

import numpy as np
import pytest

from sglmoe.prediction.calibration import Calibration
from sglmoe.prediction.forecast import FIRST_STEPS, Forecast
from sglmoe.prediction.predictor import LayerRouting, Scores, StepTokens

TOKEN = StepTokens(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32))


class Scripted:
    """Scores as given, one array for before each layer and one for after the last."""

    wants_gate_input = False
    wants_probabilities = False

    def __init__(self, *scores: list[list[float]]) -> None:
        self.script = [np.array(rows, np.float32) for rows in scores]
        self.told: list[object] = []

    def begin_step(self, tokens: StepTokens) -> None:
        self.told = ["step"]

    def observe(self, routing: LayerRouting) -> None:
        self.told.append(routing.layer)

    def scores(self) -> Scores:
        return self.script[len(self.told) - 1]

    def forget(self, owner: int) -> None:
        self.told.append(f"forget {owner}")


def uses(layer: int, expert: int) -> LayerRouting:
    return LayerRouting(layer, np.array([[expert]]), np.zeros((1, 2)))


def run_step(forecast: Forecast, *experts: int) -> None:
    forecast.begin_step(TOKEN)
    for layer, expert in enumerate(experts):
        forecast.observe(uses(layer, expert))


def test_without_calibration_scores_are_probabilities() -> None:
    predictor = Scripted([[1, 0], [0, 0.5]], [[0, 0], [0.25, 1]], [[0.5, 0], [0, 0]])
    forecast = Forecast(predictor, num_layers=2, calibration=None)
    forecast.begin_step(TOKEN)
    assert forecast.probabilities().tolist() == [[1, 0], [0, 0.5]]
    forecast.observe(uses(0, 0))
    assert forecast.probabilities()[1].tolist() == [0.25, 1]
    assert forecast.probabilities() is not predictor.script[1]  # that would change under the reader
    forecast.observe(uses(1, 1))
    assert forecast.probabilities().tolist() == [[0.5, 0], [0, 0]]  # of the next step
    forecast.forget(7)
    assert predictor.told == ["step", 0, 1, "forget 7"]


def test_scores_mean_what_became_of_them_at_the_same_distance() -> None:
    # Of layer 1: before layer 0 (two layers ahead) expert 0 was named, after it expert 1 was.
    scores = [[0, 0], [0.5, 0]], [[0, 0], [0, 0.5]], [[0, 0], [0, 0]]
    forecast = Forecast(Scripted(*scores), num_layers=2, calibration=Calibration())
    for _ in range(200):
        run_step(forecast, 0, 1)  # what was said two layers ahead was never true
    forecast.begin_step(TOKEN)
    assert forecast.probabilities()[1].tolist() == pytest.approx([0, 0], abs=0.01)
    forecast.observe(uses(0, 0))
    assert forecast.probabilities()[1].tolist() == pytest.approx([0, 1], abs=0.1)


def test_after_the_last_layer_the_first_is_one_layer_ahead() -> None:
    scores = [[0.5, 0], [0, 0]], [[0, 0], [0, 0]], [[0, 0.5], [0, 0]]
    forecast = Forecast(Scripted(*scores), num_layers=2, calibration=Calibration())
    for _ in range(200):
        run_step(forecast, 0, 0)  # 0.5 for layer 0 was always right, one layer ahead
    assert forecast.probabilities()[0].tolist() == pytest.approx([0, 1], abs=0.1)


def test_after_a_while_one_of_eight_steps_tells_how_good_the_scores_are() -> None:
    noted: list[int] = []
    steps: list[int] = []

    class Noting(Calibration):
        def note(self, *what: Any) -> None:
            noted.append(steps[-1])

    scores = [[0.5, 0], [0.5, 0]], [[0, 0], [0.5, 0]], [[0, 0], [0, 0]]
    forecast = Forecast(Scripted(*scores), num_layers=2, calibration=Noting())
    for step in range(FIRST_STEPS + 16):
        steps.append(step)
        run_step(forecast, 0, 1)
    assert noted[::2] == [*range(FIRST_STEPS), FIRST_STEPS, FIRST_STEPS + 8]
    assert noted[1::2] == noted[::2], "both layers"


def test_where_one_says_nothing_another_one_does() -> None:
    """Like a gate that knows the next layer only: not the first one, and not the one after the next."""
    main = Scripted([[0, 0], [0, 0]], [[0, 0], [0.5, 0]], [[0, 0], [0, 0]])
    counts = Scripted(*[[[0.25, 0.75], [0.75, 0.25]]] * 3)
    fallback = Forecast(counts, num_layers=2, calibration=None)
    forecast = Forecast(main, num_layers=2, calibration=None, fallback=fallback)
    forecast.begin_step(TOKEN)
    assert forecast.probabilities().tolist() == [[0.25, 0.75], [0.75, 0.25]]
    forecast.observe(uses(0, 0))
    assert forecast.probabilities()[1].tolist() == [0.5, 0]
    forecast.observe(uses(1, 0))
    assert forecast.probabilities().tolist() == [[0.25, 0.75], [0.75, 0.25]], "of the next step"
    forecast.forget(7)
    assert counts.told == main.told == ["step", 0, 1, "forget 7"]


def test_one_that_is_always_wrong_is_not_silent() -> None:
    main = Scripted(*[[[0, 0.5], [0, 0.5]]] * 3)
    counts = Scripted(*[[[0.75, 0.25], [0.75, 0.25]]] * 3)
    fallback = Forecast(counts, num_layers=2, calibration=None)
    forecast = Forecast(main, num_layers=2, calibration=Calibration(), fallback=fallback)
    for _ in range(200):
        run_step(forecast, 0, 0)
    assert forecast.probabilities()[0].tolist() == pytest.approx([0, 0], abs=0.01)
