"""What to expect of a step: a predictor's scores, as probabilities."""

import numpy as np

from sglmoe.prediction.calibration import Calibration
from sglmoe.prediction.predictor import LayerRouting, Predictor, Scores, StepTokens

# Arbitrary, these two. What becomes of scores is noted in so many steps at first, and then in one of so many: it
# takes as long as a forecast does.
FIRST_STEPS = 64
NOTED_STEPS = 8


class Forecast:
    """One predictor, told of every step, and how often its scores came true.

    Without `calibration` its scores are taken for probabilities.
    """

    def __init__(self, predictor: Predictor, *, num_layers: int, calibration: Calibration | None):
        self._predictor = predictor
        self._calibration = calibration
        self._num_layers = num_layers
        self._layer = -1  # the last one observed in this step
        self._num_steps = 0
        self._noted: Calibration | None = None  # what becomes of this step's scores goes there,
        self._scores: list[
            Scores
        ] = []  # those before the first layer, after it, after the second, ...

    @property
    def wants_gate_input(self) -> bool:
        return self._predictor.wants_gate_input

    def begin_step(self, tokens: StepTokens) -> None:
        """Another forward pass, over these tokens."""
        self._predictor.begin_step(tokens)
        self._layer = -1
        is_noted = self._num_steps < FIRST_STEPS or self._num_steps % NOTED_STEPS == 0
        self._num_steps += 1
        self._noted = self._calibration if is_noted else None
        self._scores = [self._predictor.scores()] if self._noted else []

    def observe(self, routing: LayerRouting) -> None:
        """The next layer has chosen its experts."""
        if self._noted is not None:
            self._note_outcome(self._noted, routing)
        self._predictor.observe(routing)
        self._layer = routing.layer
        if self._noted is not None:
            self._scores.append(self._predictor.scores())

    def probabilities(self) -> Scores:
        """Of the layers after the last one observed, or of all of the next step after the last one.

        A new array each time; other rows mean nothing.
        """
        scores = self._predictor.scores()
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
