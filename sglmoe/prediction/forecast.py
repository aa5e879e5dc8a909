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

    Without `calibration` its scores are taken for probabilities. Of layers that it says nothing of,
    all scores are 0, `fallback` has an opinion.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        num_layers: int,
        calibration: Calibration | None,
        fallback: "Forecast | None" = None,
    ):
        self._predictor = predictor
        self._fallback = fallback
        self._calibration = calibration
        self._num_layers = num_layers
        self._layer = -1  # the last one observed in this step
        self._num_steps = 0
        # In a step that is noted: where to, and the scores before the first layer, after it, ...
        self._noted: Calibration | None = None
        self._scores: list[Scores] = []

    @property
    def wants_gate_input(self) -> bool:
        return self._predictor.wants_gate_input

    def begin_step(self, tokens: StepTokens) -> None:
        """Another forward pass, over these tokens."""
        if self._fallback is not None:
            self._fallback.begin_step(tokens)
        self._predictor.begin_step(tokens)
        self._layer = -1
        is_noted = self._num_steps < FIRST_STEPS or self._num_steps % NOTED_STEPS == 0
        self._num_steps += 1
        self._noted = self._calibration if is_noted else None
        self._scores = [self._predictor.scores()] if self._noted else []

    def observe(self, routing: LayerRouting) -> None:
        """The next layer has chosen its experts."""
        if self._fallback is not None:
            self._fallback.observe(routing)
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
        first = (self._layer + 1) % self._num_layers
        probabilities = self._probabilities(scores, first)
        if self._fallback is not None:
            is_silent = ~scores[first:].any(axis=1)
            if is_silent.any():
                probabilities[first:][is_silent] = self._fallback.probabilities()[first:][is_silent]
        return probabilities

    def forget(self, owner: int) -> None:
        """The request has ended."""
        if self._fallback is not None:
            self._fallback.forget(owner)
        self._predictor.forget(owner)

    def _probabilities(self, scores: Scores, first: int) -> Scores:
        """Of the layers from `first` on."""
        if self._calibration is None:
            return scores.copy()
        return self._calibration.probabilities(scores, first - 1)

    def _note_outcome(self, calibration: Calibration, routing: LayerRouting) -> None:
        """Everything that was predicted of this layer in this step, the latest last."""
        predicted = np.stack([scores[routing.layer] for scores in self._scores])
        is_used = np.zeros(predicted.shape[1], np.bool_)
        is_used[routing.expert_ids.ravel()] = True
        calibration.note(predicted, np.arange(len(predicted), 0, -1), is_used)


def calibrated(
    predictor: Predictor, *, num_layers: int, fallback: Predictor | None = None
) -> Forecast:
    """As served: both by how often their scores came true."""
    return Forecast(
        predictor,
        num_layers=num_layers,
        calibration=Calibration(),
        fallback=calibrated(fallback, num_layers=num_layers) if fallback else None,
    )
