"""Between the forward pass and the predictor thread: tells it what runs, begins what it asks for, stops if that does not pay.

Main thread only. Changes when experts arrive, never what is computed.
"""

import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.config import PrefetchMode
from sglmoe.memory.experts import ABSENT
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.step_times import StepTimes
from sglmoe.prediction.advisor import MAX_TOKENS, Advisor, LinkTimes, Outlook
from sglmoe.prediction.predictor import StepTokens
from sglmoe.prediction.prefetch import loads_to_begin
from sglmoe.prediction.thread import LayerRouted, PredictorThread, StepBegun
from sglmoe.prediction.trial import Trial, Verdict
from sglmoe.protocol import MemorySnapshot, PrefetchReport
from sglmoe.worker.routed import Routed
from sglmoe.worker.step_watch import StepCost, StepKind

logger = logging.getLogger(__name__)

# Arbitrary: decode steps from one report to the next.
REPORT_STEPS = 64


class Prefetching:
    """`--expert-prefetch observe|on`. `first_load_seconds` is what a load is taken to cost until one was measured."""

    def __init__(
        self,
        memory: MemoryManager,
        advisor: Advisor,
        *,
        mode: PrefetchMode,
        times: StepTimes,
        first_load_seconds: float,
        trial: Trial | None = None,
    ):
        self._memory = memory
        self._advisor = advisor
        self._thread = PredictorThread(advisor)
        self._mode = mode
        self._times = times
        self._first_load_seconds = first_load_seconds
        self._num_layers = len(memory.frame_table)
        self._trial = trial or Trial()
        self._owners: dict[str, int] = {}
        self._free_owners: list[int] = []
        self._step = 0
        self._layer = -1
        self._is_bulk = False
        self._is_telling = (
            True  # predictors of this step; where it does not pay they cost nothing either
        )
        self._now = LinkTimes(1.0, 1.0)
        self._before = memory.snapshot(0)
        self._late = self._unused = (
            0  # prefetches of the last step that came late, and that were wasted
        )
        self._saved_seconds = 0.0
        self._num_decode_steps = 0
        self._is_paused = False
        self.report = PrefetchReport(mode=mode.value)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------ a step

    def begin_step(
        self,
        rids: Sequence[str],
        *,
        token_ids: npt.NDArray[Any],
        positions: npt.NDArray[Any],
        owners: npt.NDArray[Any],
    ) -> None:
        """T tokens are about to be computed: `owners` [T] are indices into `rids`. Memory has begun the step."""
        self._step += 1
        self._layer = -1
        self._is_telling = self._mode is PrefetchMode.OBSERVE or not self._trial.is_resting
        if not self._is_telling:
            return
        self._is_bulk = len(token_ids) > MAX_TOKENS
        self.look_ahead()
        numbers = np.array([self._number(rid) for rid in rids], np.int32)
        tokens = StepTokens(token_ids.astype(np.int32), positions.astype(np.int32), numbers[owners])
        self._now = self._link_times(len(rids))
        self._thread.begin_step(StepBegun(self._step, tokens, self._now, self._late, self._unused))

    def routed(self, layer: int, routing: Routed) -> None:
        """The layer has chosen its experts, and has not asked memory for them."""
        self._layer = layer
        if not self._is_telling:
            return
        arrays = routing.arrays(
            with_probabilities=not self._is_bulk and self._advisor.wants_probabilities,
            with_gate_input=not self._is_bulk and self._advisor.wants_gate_input,
        )
        was_absent = self._memory.frame_table[layer] == ABSENT
        self._thread.routed(LayerRouted(arrays, was_absent))

    def look_ahead(self) -> None:
        """Begin what the predictor has asked for, if it has: between layers, as often as it likes to be asked."""
        outlook = self._thread.outlook()
        if outlook is None or not self._is_on:
            return
        layer = self._place_of(outlook)
        if layer is None:
            return
        memory = self._memory
        memory.expect(layer, outlook.probabilities)
        limit = loads_to_begin(memory.num_on_their_way, **msgspec.structs.asdict(self._now))
        if limit:
            is_next = layer + 1 == self._num_layers
            memory.prefetch(
                (its for its in outlook.wanted if is_next or its.layer > self._layer), limit
            )

    def step_done(self, kind: StepKind, snapshot: MemorySnapshot, cost: StepCost) -> PrefetchReport:
        """To be called after every step; what is known of prefetching."""
        used = snapshot.prefetches_used - self._before.prefetches_used
        self._saved_seconds += used * (self._times.load_seconds or self._first_load_seconds)
        self._late = snapshot.prefetches_late - self._before.prefetches_late
        self._unused = snapshot.prefetches_wasted - self._before.prefetches_wasted
        self._before = snapshot
        if kind.num_decoding and not self._is_paused:
            self._decode_done(kind.num_decoding, cost.seconds)
        return self.report

    def pause(self, is_paused: bool) -> None:
        """Change nothing in memory, while somebody records what does."""
        self._is_paused = is_paused

    def forget(self, rid: str) -> None:
        """The request has ended."""
        owner = self._owners.pop(rid, None)
        if owner is not None:
            self._free_owners.append(owner)
            self._thread.forget(owner)

    def close(self) -> None:
        """Stop the thread."""
        self._thread.close()

    @property
    def num_skipped_steps(self) -> int:
        """Steps that the predictor was not told of, because it was behind."""
        return self._thread.num_skipped

    # ------------------------------------------------------------------------------------------------ inside

    @property
    def _is_on(self) -> bool:
        return self._mode is PrefetchMode.ON and self._trial.is_on and not self._is_paused

    def _place_of(self, outlook: Outlook) -> int | None:
        """The layer after which its probabilities hold, as of now; None if it is out of date."""
        if outlook.step == self._step:
            return outlook.layer
        was_last = outlook.layer + 1 == self._num_layers
        return -1 if was_last and outlook.step == self._step - 1 and self._layer == -1 else None

    def _number(self, rid: str) -> int:
        """The request's number, which another one gets when it has ended."""
        if rid not in self._owners:
            self._owners[rid] = self._free_owners.pop() if self._free_owners else len(self._owners)
        return self._owners[rid]

    def _link_times(self, num_rows: int) -> LinkTimes:
        link_seconds = self._times.link_seconds or self._first_load_seconds
        model = self._times.model
        # Before a step was measured: nothing but loads takes time.
        step_seconds = model.compute_seconds(num_rows) if model else link_seconds
        return LinkTimes(link_seconds, step_seconds / self._num_layers)

    def _decode_done(self, num_rows: int, seconds: float) -> None:
        if self._mode is PrefetchMode.ON and (verdict := self._trial.step_done(num_rows, seconds)):
            self._tell(verdict)
        self._num_decode_steps += 1
        if self._num_decode_steps % REPORT_STEPS == 0:
            self.report = self._new_report()

    def _tell(self, verdict: Verdict) -> None:
        logger.info(
            "expert prefetch %s: decode steps take %.3f of the time they take without; it is %s until the next trial",
            verdict.value,
            self._trial.ratio,
            "on" if self._trial.is_on else "off",
        )

    def _new_report(self) -> PrefetchReport:
        advisor = self._advisor
        quality = advisor.quality()
        return PrefetchReport(
            mode=self._mode.value,
            is_on=self._is_on,
            predictor=advisor.picked or "",
            reason=advisor.pick_reason,
            verdict=self._trial.verdict.value,
            step_ratio=self._trial.ratio,
            horizon_layers=advisor.horizon.layers,
            precision=quality.precision or 0.0,
            recall=quality.recall or 0.0,
            batch_accuracy=quality.batch_accuracy or 0.0,
            coverage={name: its.coverage for name, its in advisor.scores().items()},
            recall_by_layer=tuple(
                advisor.quality(layer=layer).recall or 0.0 for layer in range(self._num_layers)
            ),
            saved_seconds=self._saved_seconds,
            skipped_steps=self.num_skipped_steps,
            failed=self._thread.failed,
        )
