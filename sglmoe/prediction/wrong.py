"""Predictors that are wrong, to test and to compare with: none of them is ever picked by itself."""

import numpy as np

from sglmoe.prediction.baselines import LastStep
from sglmoe.prediction.predictor import LayerRouting, ModelParts, Scores, StepTokens

SEED = 0


class Random:
    """Other scores for each step, that mean nothing."""

    wants_gate_input = False
    wants_probabilities = False

    def __init__(self, parts: ModelParts):
        self._shape = (parts.num_layers, parts.num_experts)
        self._random = np.random.default_rng(SEED)
        self._scores: Scores = np.zeros(self._shape, np.float32)

    def begin_step(self, tokens: StepTokens) -> None:
        self._scores = self._random.random(self._shape, np.float32)

    def observe(self, routing: LayerRouting) -> None:
        """It would not know what to do with it."""

    def scores(self) -> Scores:
        return self._scores

    def forget(self, owner: int) -> None:
        """Nothing is kept of requests."""


class Contrary:
    """Expects what `LastStep` does not: the experts that no request used in its last token."""

    wants_gate_input = False
    wants_probabilities = False

    def __init__(self, parts: ModelParts):
        self._last_step = LastStep(parts)

    def begin_step(self, tokens: StepTokens) -> None:
        self._last_step.begin_step(tokens)

    def observe(self, routing: LayerRouting) -> None:
        self._last_step.observe(routing)

    def scores(self) -> Scores:
        return 1 - self._last_step.scores()

    def forget(self, owner: int) -> None:
        self._last_step.forget(owner)
