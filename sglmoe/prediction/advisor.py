"""What to bring in next, and how good such advice has been: one step after the other, one layer after the other."""

from collections.abc import Callable, Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.memory.experts import ABSENT
from sglmoe.memory.layer_streaming import BULK_TOKENS
from sglmoe.memory.prefetch import Wanted
from sglmoe.prediction.forecast import Forecast, calibrated
from sglmoe.prediction.horizon import Horizon, expected_loads
from sglmoe.prediction.predictor import LayerRouting, Predictor, Scores, StepTokens
from sglmoe.prediction.prefetch import PrefetchSnapshot, loads_to_begin, plan_prefetch
from sglmoe.prediction.quality import Quality, QualityCounter, at_least

# Arbitrary, these four. So many decode steps in which all predictors are heard before one is picked,
AUDITION_STEPS = 64
# and then one of so many steps tells how good the advice is, which takes longer than to give it.
QUALITY_STEPS = 8
MIN_PROBABILITY = 0.05


class LinkTimes(msgspec.Struct, frozen=True):
    """What was measured."""

    expert_seconds: float  # to bring one in
    layer_seconds: float  # a layer computes, without waiting for experts


class Outlook(msgspec.Struct, frozen=True, eq=False):
    """What is to come after a layer of a step; after the last one, in the next step."""

    step: int
    layer: int
    probabilities: Scores
    wanted: list[Wanted]  # the most urgent first


class Score(msgspec.Struct):
    """What became of a predictor's plans: of misses that it could have prevented."""

    planned: int = 0
    useful: int = 0
    missed: int = 0

    @property
    def coverage(self) -> float:
        """Of the experts that layers needed and did not have, the share that was planned for."""
        return self.useful / self.missed if self.missed else 0.0


class _Candidate:
    """A predictor, what it expects, and what it would have brought in."""

    def __init__(self, predictor: Predictor, fallback: Predictor | None, shape: tuple[int, int]):
        self.predictor = predictor
        self.forecast = calibrated(predictor, num_layers=shape[0], fallback=fallback)
        self.score = Score()
        self._planned: npt.NDArray[np.bool_] = np.zeros(shape, np.bool_)

    def note_plan(self, wanted: list[Wanted]) -> None:
        for its in wanted:
            self._planned[its.layer, its.expert] = True

    def forget_plans(self) -> None:
        self._planned[:] = False

    def note_layer(self, layer: int, missed: npt.NDArray[np.bool_]) -> None:
        planned = self._planned[layer]
        self.score.planned += int(planned.sum())
        self.score.useful += int((planned & missed).sum())
        self.score.missed += int(missed.sum())
        planned[:] = False


class Advisor:
    """Owns the predictors. Hears all of them for a while, then the one whose plans were the most use.

    `predictors` has at least one, by name; where one says nothing of a layer, a `fallback` of its own
    speaks. `bulk` speaks for steps of many tokens. `frame_table` is memory's: it changes meanwhile,
    and what it says may be out of date by a layer.
    """

    def __init__(
        self,
        predictors: Mapping[str, Predictor],
        bulk: Predictor,
        *,
        frame_table: npt.NDArray[np.int32],
        fallback: Callable[[], Predictor] | None = None,
    ):
        self._shape = frame_table.shape[0], frame_table.shape[1]
        self._frame_table = frame_table
        self._candidates = {
            name: _Candidate(its, fallback() if fallback else None, self._shape)
            for name, its in predictors.items()
        }
        self._bulk = calibrated(bulk, num_layers=self._shape[0])
        self._picked = next(iter(predictors)) if len(predictors) == 1 else None
        self._speaks = self._first
        self._heard_steps = 0  # in which all were heard
        self.keeps_score = (
            True  # of plans and probabilities, in this step: needs an `outlook` after each layer
        )
        self._step = self._layer = -1
        self._times = LinkTimes(1.0, 1.0)
        self.horizon = Horizon(self._shape[0])
        self._quality = QualityCounter(self._shape[0])
        self.pick_reason = ""

    @property
    def picked(self) -> str | None:
        """The predictor that is listened to; None while all are heard."""
        return self._picked

    @property
    def wants_gate_input(self) -> bool:
        """Whether anyone who is listened to does."""
        return any(its.predictor.wants_gate_input for its in self._heard().values())

    @property
    def wants_probabilities(self) -> bool:
        """The same of the router's."""
        return any(its.predictor.wants_probabilities for its in self._heard().values())

    # ---------------------------------------------------------------------------------------- events

    def begin_step(
        self, step: int, tokens: StepTokens, times: LinkTimes, *, late: int, unused: int
    ) -> None:
        """Another forward pass; so many prefetches of the one before were late, or of no use."""
        self._step, self._layer, self._times = step, -1, times
        is_bulk = tokens.num_tokens > BULK_TOKENS  # how often each is used tells enough of it
        if self._picked is None and not is_bulk:
            self._pick_in_time()
        self.keeps_score = self._picked is None or step % QUALITY_STEPS == 0
        for its in self._heard().values():
            its.forecast.begin_step(tokens)
            if is_bulk or not self.keeps_score:
                its.forget_plans()
        self._speaks = self._bulk if is_bulk else self._first
        if is_bulk:
            self._bulk.begin_step(tokens)
        self._adapt(late, unused)

    def observe(self, routing: LayerRouting, *, was_absent: npt.NDArray[np.bool_]) -> None:
        """The next layer has chosen its experts, of which those were in no frame: `[num_experts]`."""
        self._layer = routing.layer
        used = np.zeros(self._shape[1], np.bool_)
        used[routing.expert_ids.ravel()] = True
        if self._speaks is self._bulk:
            self._bulk.observe(routing)
            return
        if self.keeps_score:
            self._measure(routing.layer, used, was_absent)
            for its in self._heard().values():
                its.note_layer(routing.layer, used & was_absent)
        for its in self._heard().values():
            its.forecast.observe(routing)

    def forget(self, owner: int) -> None:
        """The request has ended."""
        for its in self._candidates.values():
            its.forecast.forget(owner)
        self._bulk.forget(owner)

    def outlook(self) -> Outlook:
        """From what has been observed so far."""
        is_here = self._frame_table != ABSENT
        probabilities = self._speaks.probabilities()
        wanted = self._plan(probabilities, is_here)
        if self._speaks is not self._bulk and self.keeps_score:
            for its in self._heard().values():
                forecast = its.forecast
                is_speaker = forecast is self._speaks
                its.note_plan(
                    wanted if is_speaker else self._plan(forecast.probabilities(), is_here)
                )
        return Outlook(self._step, self._layer, probabilities, wanted)

    # ----------------------------------------------------------------------------------------- state

    def scores(self) -> dict[str, Score]:
        return {name: its.score for name, its in self._candidates.items()}

    def quality(self, *, layer: int | None = None) -> Quality:
        """Of the probabilities of the layer ahead."""
        return self._quality.quality(layer=layer)

    # ---------------------------------------------------------------------------------------- inside

    @property
    def _first(self) -> Forecast:
        """Who speaks: the one picked, or the first as long as none is."""
        name = self._picked or next(iter(self._candidates))
        return self._candidates[name].forecast

    def _heard(self) -> dict[str, _Candidate]:
        if self._picked is None:
            return self._candidates
        return {self._picked: self._candidates[self._picked]}

    def _pick_in_time(self) -> None:
        self._heard_steps += 1
        if self._heard_steps <= AUDITION_STEPS:
            return
        scores = self.scores()
        self._picked = max(scores, key=lambda name: scores[name].useful)
        told = ", ".join(f"{name} {its.coverage:.0%}" for name, its in scores.items())
        self.pick_reason = f"misses that plans would have prevented: {told}"

    def _adapt(self, late: int, unused: int) -> None:
        self.horizon.note(late=late, unused=unused)
        self.horizon.update(
            expected_loads(self._speaks.probabilities(), self._frame_table != ABSENT),
            expert_seconds=self._times.expert_seconds,
            layer_seconds=self._times.layer_seconds,
        )

    def _plan(self, probabilities: Scores, is_here: npt.NDArray[np.bool_]) -> list[Wanted]:
        return plan_prefetch(
            PrefetchSnapshot(
                layer=-1 if self._layer + 1 == self._shape[0] else self._layer,
                probabilities=probabilities,
                is_resident=is_here,
                horizon=self.horizon.layers,
                num_loads=loads_to_begin(
                    0,
                    expert_seconds=self._times.expert_seconds,
                    layer_seconds=self._times.layer_seconds,
                ),
                min_probability=MIN_PROBABILITY,
            )
        )

    def _measure(
        self, layer: int, used: npt.NDArray[np.bool_], was_absent: npt.NDArray[np.bool_]
    ) -> None:
        probabilities = self._speaks.probabilities()[layer]
        self._quality.note(
            layer,
            1,
            probabilities=probabilities,
            predicted=at_least(probabilities, MIN_PROBABILITY),
            used=used,
            absent=was_absent,
        )
