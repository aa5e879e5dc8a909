"""Predictors for replays, by name: those of the product, and bounds that know the trace."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sglmoe.prediction.baselines import Frequency, LastStep
from sglmoe.prediction.forecast import Forecast, calibrated
from sglmoe.prediction.hybrid_command import read_embeddings
from sglmoe.prediction.predictor import LayerRouting, ModelParts, Predictor, Scores, StepTokens
from sglmoe.prediction.trace import Trace
from sglmoe.prediction.training_data import vocab_size_of
from sglmoe.worker.predictors import Sources, predictors_for

SEED = 0


def uses_of(trace: Trace) -> npt.NDArray[np.bool_]:
    """`[steps, layers, experts]`: whether any token of the step used it."""
    info = trace.info
    uses = np.zeros((trace.num_steps, info.num_layers, info.num_experts), np.bool_)
    for step, layers in enumerate(trace.experts_by_layer()):
        for layer, experts in enumerate(layers):
            uses[step, layer, experts] = True
    return uses


class Foreseen:
    """What a step will use, as long as steps come in the order of the trace.

    After the last layer: what the next step will use, or nothing. `share_right` of the experts that
    it names are right; for each of the others it names one that is not used, if there is any.
    """

    wants_gate_input = False
    wants_probabilities = False

    def __init__(self, trace: Trace, *, knows_next_step: bool, share_right: float = 1.0):
        uses = uses_of(trace)
        self._named = with_errors(uses, share_right) if share_right < 1 else uses
        self._knows_next_step = knows_next_step
        self._step = -1
        self._is_over = False

    def begin_step(self, tokens: StepTokens) -> None:
        self._step += 1
        self._is_over = False

    def observe(self, routing: LayerRouting) -> None:
        self._is_over = routing.layer + 1 == self._named.shape[1]

    def scores(self) -> Scores:
        step = self._step + self._is_over
        if step == len(self._named) or (self._is_over and not self._knows_next_step):
            return np.zeros(self._named.shape[1:], np.float32)
        scores: Scores = self._named[step].astype(np.float32)
        return scores

    def forget(self, owner: int) -> None:
        """Nothing is kept of requests."""


def with_errors(uses: npt.NDArray[np.bool_], share_right: float) -> npt.NDArray[np.bool_]:
    """Some of the used ones swapped for others of the same layer."""
    random = np.random.default_rng(SEED)
    named = uses & (random.random(uses.shape) < share_right)
    num_swapped = (uses & ~named).sum(axis=2, keepdims=True)
    # Ranks of those not used, in a random order; used ones come after all of them.
    ranks = np.where(uses, 2.0, random.random(uses.shape)).argsort(axis=2).argsort(axis=2)
    swapped_in: npt.NDArray[np.bool_] = (ranks < num_swapped) & ~uses
    return named | swapped_in


class NextPlan(LastStep):
    """`last_step`, but after the last layer it is told who is in the next step: that plan is with the worker already."""

    def __init__(self, trace: Trace):
        info = trace.info
        super().__init__(ModelParts(info.num_layers, info.num_experts, info.top_k))
        self._trace = trace
        self._step = -1

    def begin_step(self, tokens: StepTokens) -> None:
        self._step += 1
        super().begin_step(tokens)

    def observe(self, routing: LayerRouting) -> None:
        super().observe(routing)
        if (
            routing.layer + 1 == self._trace.info.num_layers
            and self._step + 1 < self._trace.num_steps
        ):
            start, stop = self._trace.step_bounds[self._step + 1 : self._step + 3].tolist()
            owners = set(self._trace.owners[start:stop].tolist())
            self._scores = self._scores_of([its for its in self._experts if its in owners])


class AlwaysWrong:
    """Is sure of all that the step will not use."""

    wants_gate_input = False
    wants_probabilities = False

    def __init__(self, trace: Trace):
        self._uses = uses_of(trace)
        self._step = -1

    def begin_step(self, tokens: StepTokens) -> None:
        self._step += 1

    def observe(self, routing: LayerRouting) -> None:
        """It knows already."""

    def scores(self) -> Scores:
        scores: Scores = (~self._uses[self._step]).astype(np.float32)
        return scores

    def forget(self, owner: int) -> None:
        """Nothing is kept of requests."""


class Material:
    """What predictors are made of: a trace, and what of its model they may use."""

    def __init__(self, trace: Trace, model_path: Path):
        self.trace = trace
        self._model_path = model_path

    @cached_property
    def sources(self) -> Sources:
        """As the server has them."""
        from sglmoe.prediction.gate_inputs import read_router  # imports transformers: 5 s

        info = self.trace.info
        return Sources(
            parts=ModelParts(
                num_layers=info.num_layers,
                num_experts=info.num_experts,
                top_k=info.top_k,
                embed=read_embeddings(self._model_path),
            ),
            router=read_router(self._model_path),
            vocab_size=vocab_size_of(self._model_path),
            folder=self._model_path,
        )

    @cached_property
    def gate_inputs(self) -> npt.NDArray[np.float32]:
        """`[T, layers, hidden]`, computed again by transformers."""
        from sglmoe.prediction.gate_inputs import gate_inputs

        return gate_inputs(self.trace, self._model_path)


# Those that know the trace.
BOUNDS: dict[str, Callable[[Trace], Predictor]] = {
    "oracle": lambda trace: Foreseen(trace, knows_next_step=False),
    "oracle_next_step": lambda trace: Foreseen(trace, knows_next_step=True),
    "oracle_80": lambda trace: Foreseen(trace, knows_next_step=False, share_right=0.8),
    "oracle_50": lambda trace: Foreseen(trace, knows_next_step=False, share_right=0.5),
    "next_plan": NextPlan,
    "adversarial": AlwaysWrong,
    "adversarial_believed": AlwaysWrong,
}
BELIEVED = ("oracle", "oracle_next_step", "adversarial_believed")  # their scores are probabilities


def predictors_by(name: str, material: Material) -> dict[str, Predictor]:
    """One of BOUNDS, or what the server has by that name; AUTO: all of that. New ones.

    Raises ValueError for one that does not exist, or does not fit the model.
    """
    if name in BOUNDS:
        return {name: BOUNDS[name](material.trace)}
    return predictors_for(name, material.sources)


def forecast_by(name: str, material: Material) -> Forecast:
    """A new one, that knows nothing yet; of one predictor."""
    (predictor,) = predictors_by(name, material).values()
    num_layers = material.trace.info.num_layers
    if name in BELIEVED:
        return Forecast(predictor, num_layers=num_layers, calibration=None)
    fallback = None if name in BOUNDS else Frequency(material.sources.parts)
    return calibrated(predictor, num_layers=num_layers, fallback=fallback)
