"""What to expect of a step: a predictor's scores, as probabilities."""

import numpy as np

from sglmoe.prediction.calibration import Calibration
from sglmoe.prediction.predictor import LayerRouting, Predictor, Scores, StepTokens


class Forecast:
    """One predictor, told of every step, and how often its scores came true.

    Without `calibration` its scores are taken for probabilities.
    """

    def __init__(self, predictor: Predictor, *, num_layers: int, calibration: Calibration | None):
        self._predictor = predictor
        self._calibration = calibration
        self._num_layers = num_layers
        self._layer = -1  # the last one observed in this step
        self._scores: list[Scores] = []  # before the first layer, after it, after the second, ...

    @property
    def wants_gate_input(self) -> bool:
        return self._predictor.wants_gate_input

    def begin_step(self, tokens: StepTokens) -> None:
        """Another forward pass, over these tokens."""
        self._predictor.begin_step(tokens)
        self._layer = -1
        self._scores = [self._predictor.scores()]

    def observe(self, routing: LayerRouting) -> None:
        """The next layer has chosen its experts."""
        if self._calibration is not None:
            self._note_outcome(self._calibration, routing)
        self._predictor.observe(routing)
        self._layer = routing.layer
        self._scores.append(self._predictor.scores())

    def probabilities(self) -> Scores:
        """Of the layers after the last one observed, or of all of the next step after the last one.

        A new array each time; other rows mean nothing.
        """
        scores = self._scores[-1]
        if self._calibration is None:
            return scores.copy()
        is_over = self._layer + 1 == self._num_layers
        return self._calibration.probabilities(scores, -1 if is_over else self._layer)

    def forget(self, owner: int) -> None:
        """The request has ended."""
        self._predictor.forget(owner)

    def _note_outcome(self, calibration: Calibration, routing: LayerRouting) -> None:
        """Everything that was predicted of this layer in this step, the latest last."""
        predicted = np.stack([scores[routing.layer] for scores in self._scores])
        is_used = np.zeros(predicted.shape[1], np.bool_)
        is_used[routing.expert_ids.ravel()] = True
        calibration.note(predicted, np.arange(len(predicted), 0, -1), is_used)
