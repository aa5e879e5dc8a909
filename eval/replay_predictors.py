"""Predictors for replays, by name: those of the product, and bounds that know the trace."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.config import AUTO
from sglmoe.prediction.baselines import Frequency, LastStep, PreviousLayer
from sglmoe.prediction.calibration import Calibration
from sglmoe.prediction.expert_map import ExpertMap
from sglmoe.prediction.forecast import Forecast
from sglmoe.prediction.hybrid_command import read_embeddings
from sglmoe.prediction.predictor import LayerRouting, ModelParts, Predictor, Scores, StepTokens
from sglmoe.prediction.pregate import Pregate
from sglmoe.prediction.router import Router
from sglmoe.prediction.trace import Trace
from sglmoe.prediction.training_data import vocab_size_of
from sglmoe.prediction.wrong import Random
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


class AlwaysWrong:
    """Is sure of all that the step will not use."""

    wants_gate_input = False

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
        self.parts = ModelParts(
            num_layers=trace.info.num_layers,
            num_experts=trace.info.num_experts,
            top_k=trace.info.top_k,
            embed=read_embeddings(model_path),
        )

    @cached_property
    def gate_inputs(self) -> npt.NDArray[np.float32]:
        """`[T, layers, hidden]`, computed again by transformers."""
        from sglmoe.prediction.gate_inputs import gate_inputs  # imports torch and transformers: 5 s

        return gate_inputs(self.trace, self._model_path)

    @cached_property
    def router(self) -> Router:
        from sglmoe.prediction.gate_inputs import read_router

        return read_router(self._model_path)

    @cached_property
    def sources(self) -> Sources:
        """As a server would have them."""
        return Sources(
            parts=self.parts,
            router=self.router,
            vocab_size=vocab_size_of(self._model_path),
            folder=self._model_path,
        )


class Source(msgspec.Struct, frozen=True):
    """How to make a predictor."""

    make: Callable[[Material], Predictor]
    is_calibrated: bool = True  # else its scores are probabilities


PREDICTORS = {
    "oracle": Source(lambda its: Foreseen(its.trace, knows_next_step=False), False),
    "oracle-next-step": Source(lambda its: Foreseen(its.trace, knows_next_step=True), False),
    "oracle-80": Source(lambda its: Foreseen(its.trace, knows_next_step=False, share_right=0.8)),
    "oracle-50": Source(lambda its: Foreseen(its.trace, knows_next_step=False, share_right=0.5)),
    "adversarial": Source(lambda its: AlwaysWrong(its.trace)),
    "adversarial-believed": Source(lambda its: AlwaysWrong(its.trace), False),
    "random": Source(lambda its: Random(its.parts)),
    "last-step": Source(lambda its: LastStep(its.parts)),
    "frequency": Source(lambda its: Frequency(its.parts)),
    "previous-layer": Source(lambda its: PreviousLayer(its.parts)),
    "expert-map": Source(lambda its: ExpertMap(its.parts)),
    "pregate": Source(lambda its: Pregate(its.parts, its.router)),
}


def predictors_by(name: str, material: Material) -> dict[str, Predictor]:
    """New ones for an advisor; AUTO: all that the server has, until it picks one."""
    if name == AUTO:
        return predictors_for(AUTO, material.sources)
    return {name: PREDICTORS[name].make(material)}


def forecast_by(name: str, material: Material) -> Forecast:
    """A new one, that knows nothing yet."""
    source = PREDICTORS[name]
    return Forecast(
        source.make(material),
        num_layers=material.parts.num_layers,
        calibration=Calibration() if source.is_calibrated else None,
    )
