"""Between the forward pass and the predictor: tells it what runs, begins what it asks for, stops if that does not pay.

Main thread only. Changes when experts arrive, never what is computed.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sglmoe.config import PrefetchMode
from sglmoe.memory.layer_streaming import BULK_TOKENS
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.step_times import StepTimes
from sglmoe.prediction.advisor import LinkTimes, Outlook
from sglmoe.prediction.predictor import Embed
from sglmoe.prediction.prefetch import loads_to_begin
from sglmoe.prediction.trial import Trial, Verdict
from sglmoe.predictor.client import PredictorClient, Said
from sglmoe.predictor.messages import StepBegun, array_bytes
from sglmoe.protocol import MemorySnapshot, PrefetchReport
from sglmoe.worker.routed import Routed
from sglmoe.worker.step_watch import StepCost, StepKind

logger = logging.getLogger(__name__)

# Arbitrary: decode steps from one report to the next.
REPORT_STEPS = 64
# Arbitrary: while predictors rest, ends of more requests are forgotten. Their numbers are given out again.
MAX_ENDED = 4096


class Prefetching:
    """`--expert-prefetch observe|on`. `first_load_seconds` is what a load is taken to cost until one was measured.

    Without `embed`, which looks tokens up in the model's table, predictors get no embeddings.
    """

    def __init__(
        self,
        memory: MemoryManager,
        predictor: PredictorClient,
        *,
        mode: PrefetchMode,
        times: StepTimes,
        first_load_seconds: float,
        trial: Trial | None = None,
        embed: Embed | None = None,
    ):
        self._memory = memory
        self._predictor = predictor
        self._embed = embed
        self._mode = mode
        self._times = times
        self._first_load_seconds = first_load_seconds
        self._num_layers = len(memory.frame_table)
        self._trial = trial or Trial()
        self._owners: dict[str, int] = {}
        self._free_owners: list[int] = []
        self._ended: list[int] = []  # owners whose end the predictor has not been told
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
        self._is_bulk = len(token_ids) > BULK_TOKENS
        self.look_ahead()
        numbers = np.array([self._number(rid) for rid in rids], np.int32)
        self._now = self._link_times(len(rids))
        event = StepBegun(
            step=self._step,
            token_ids=array_bytes(token_ids, np.int32),
            positions=array_bytes(positions, np.int32),
            owners=numbers[owners].tobytes(),
            embeddings=self._embeddings(token_ids),
            ended=self._ended,
            frames=self._memory.frame_table.tobytes(),
            times=self._now,
            late=self._late,
            unused=self._unused,
            wants_advice=self._is_on,
        )
        self._ended = []
        self._predictor.tell(Said(event))

    def routed(self, layer: int, routing: Routed) -> None:
        """The layer has chosen its experts, and has not asked memory for them."""
        self._layer = layer
        if not self._is_telling:
            return
        wishes = self._predictor.wishes
        self._predictor.tell(
            routing.to_host(
                self._frames_from(layer, wishes.layers_ahead),
                with_logits=not self._is_bulk and wishes.logits,
                with_gate_input=not self._is_bulk and wishes.gate_input,
            )
        )

    def look_ahead(self) -> None:
        """Begin what the predictor has asked for, if it has: between layers, as often as it likes to be asked."""
        outlook = self._predictor.outlook()
        if outlook is None or not self._is_on:
            return
        layer = self._place_of(outlook)
        if layer is None:
            return
        memory = self._memory
        memory.expect(layer, outlook.probabilities)
        limit = loads_to_begin(
            memory.num_on_their_way,
            expert_seconds=self._now.expert_seconds,
            layer_seconds=self._now.layer_seconds,
        )
        if limit:
            is_next = layer + 1 == self._num_layers
            memory.prefetch(
                (its for its in outlook.wanted if is_next or its.layer > self._layer), limit
            )

    @property
    def num_ahead(self) -> int:
        """So many experts does the link move while a step runs, if they are wanted."""
        if not self._is_on:
            return 0
        now = self._now
        return int(self._num_layers * now.layer_seconds / now.expert_seconds)

    def step_done(self, kind: StepKind, snapshot: MemorySnapshot, cost: StepCost) -> PrefetchReport:
        """To be called after every step; what is known of prefetching."""
        used = snapshot.prefetches_used - self._before.prefetches_used
        self._saved_seconds += used * (self._times.load_seconds or self._first_load_seconds)
        # What was streamed says nothing about the horizon.
        is_streaming = snapshot.experts_streamed > self._before.experts_streamed
        late = snapshot.prefetches_late - self._before.prefetches_late
        unused = snapshot.prefetches_wasted - self._before.prefetches_wasted
        self._late, self._unused = (0, 0) if is_streaming else (late, unused)
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
            if len(self._ended) < MAX_ENDED:
                self._ended.append(owner)

    def close(self) -> None:
        """End the predictor."""
        self._predictor.close()

    @property
    def num_skipped_steps(self) -> int:
        """Steps that the predictor was not told of, because it was behind."""
        return self._predictor.num_skipped

    # ------------------------------------------------------------------------------------------------ inside

    @property
    def _is_on(self) -> bool:
        return self._mode is PrefetchMode.ON and self._trial.is_on and not self._is_paused

    def _frames_from(self, layer: int, layers_ahead: int) -> bytes:
        """Of this layer and so many after it; the last one is before all layers of the next step."""
        table = self._memory.frame_table
        if layer + 1 < self._num_layers:
            table = table[layer : layer + 1 + layers_ahead]
        return table.tobytes()

    def _embeddings(self, token_ids: npt.NDArray[Any]) -> bytes:
        if self._embed is None or self._is_bulk or not self._predictor.wishes.embeddings:
            return b""
        return array_bytes(self._embed(token_ids), np.float32)

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
        self._predictor.check()
        its = self._predictor.report
        return PrefetchReport(
            mode=self._mode.value,
            is_on=self._is_on,
            predictor=its.predictor,
            reason=its.reason,
            verdict=self._trial.verdict.value,
            step_ratio=self._trial.ratio,
            horizon_layers=its.horizon_layers,
            precision=its.precision,
            recall=its.recall,
            batch_accuracy=its.batch_accuracy,
            coverage=its.coverage,
            recall_by_layer=its.recall_by_layer,
            saved_seconds=self._saved_seconds,
            skipped_steps=self.num_skipped_steps,
            failed=self._predictor.failed,
        )
