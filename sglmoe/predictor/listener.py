"""What the predictor's process does with messages: an advisor hears of steps and layers, and its advice is worded."""

from typing import assert_never

import numpy as np
import numpy.typing as npt

from sglmoe.memory.experts import ABSENT
from sglmoe.prediction.advisor import Advisor, Outlook
from sglmoe.prediction.predictor import LayerRouting, StepTokens
from sglmoe.predictor.messages import (
    Advice,
    AdvisorReport,
    LayerRouted,
    Status,
    StepBegun,
    Wishes,
    array_bytes,
    rows,
)

# Arbitrary: so many steps from one report to the next.
REPORT_STEPS = 16


class SentEmbeddings:
    """The model's embeddings of a step's tokens, as predictors ask for them (`predictor.Embed`).

    Of a step that they were not sent for, of many tokens for instance, all are zeros `[hidden]`.
    """

    def __init__(self, hidden: int) -> None:
        self.is_asked = False  # whether anyone has been, in this step
        self._hidden = hidden
        self._token_ids: npt.NDArray[np.int32] = np.zeros(0, np.int32)  # ascending
        self._rows: npt.NDArray[np.float32] = np.zeros((0, hidden), np.float32)

    def note(self, token_ids: npt.NDArray[np.int32], embeddings: npt.NDArray[np.float32]) -> None:
        """Of the next step: `embeddings` [T, hidden], or [0, hidden] if they were not sent."""
        self.is_asked = False
        self._token_ids, places = np.unique(token_ids[: len(embeddings)], return_index=True)
        self._rows = embeddings[places]

    def unpack(self, data: bytes) -> npt.NDArray[np.float32]:
        return np.frombuffer(data, np.float32).reshape(-1, self._hidden)

    def __call__(self, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """[T, hidden] of tokens of this step."""
        self.is_asked = True
        if not len(self._rows):
            return np.zeros((len(token_ids), self._hidden), np.float32)
        found: npt.NDArray[np.float32] = self._rows[np.searchsorted(self._token_ids, token_ids)]
        return found


class Listener:
    """Owns an advisor, and the frame table that it reads, which is as it has last heard of it."""

    def __init__(
        self, advisor: Advisor, frame_table: npt.NDArray[np.int32], embeddings: SentEmbeddings
    ):
        self._advisor = advisor
        self._frame_table = frame_table
        self._shape = frame_table.shape[0], frame_table.shape[1]
        self._embeddings = embeddings
        self._wants_embeddings = True
        self._wants_advice = True
        self._is_status_due = self._is_report_due = True

    def hear(self, event: StepBegun | LayerRouted) -> None:
        match event:
            case StepBegun():
                self._begin_step(event)
            case LayerRouted():
                self._routed(event)
            case _:
                assert_never(event)

    @property
    def is_asked(self) -> bool:
        """Whether `answers` should be taken after each of the step's layers."""
        return self._wants_advice or self._advisor.keeps_score

    def answers(self) -> list[Status | Advice]:
        """To what has been heard so far."""
        answers: list[Status | Advice] = []
        if self._is_status_due:
            answers.append(self._status())
        if self.is_asked:
            outlook = self._advisor.outlook()
            if self._wants_advice:
                answers.append(advice_of(outlook))
        return answers

    def _begin_step(self, event: StepBegun) -> None:
        for owner in event.ended:
            self._advisor.forget(owner)
        token_ids, positions, owners = (
            np.frombuffer(its, np.int32) for its in (event.token_ids, event.positions, event.owners)
        )
        self._embeddings.note(token_ids, self._embeddings.unpack(event.embeddings))
        self._note_frames(event.frames, 0)
        self._advisor.begin_step(
            event.step,
            StepTokens(token_ids, positions, owners),
            event.times,
            late=event.late,
            unused=event.unused,
        )
        self._wants_embeddings = self._embeddings.is_asked
        self._wants_advice = event.wants_advice
        self._is_status_due = True
        self._is_report_due |= event.step % REPORT_STEPS == 0

    def _routed(self, event: LayerRouted) -> None:
        self._note_frames(event.frames, event.layer)
        was_absent = self._frame_table[event.layer] == ABSENT
        num_scored = event.num_tokens if event.logits else 0
        logits = np.frombuffer(event.logits, np.float32).reshape(num_scored, self._shape[1])
        routing = LayerRouting(
            event.layer,
            rows(event.expert_ids, np.int32, event.num_tokens),
            softmax(logits),
            rows(event.gate_input, np.float32, event.num_tokens) if event.gate_input else None,
        )
        self._advisor.observe(routing, was_absent=was_absent)

    def _note_frames(self, frames: bytes, layer: int) -> None:
        """Of all layers, or of those from this one on."""
        table = np.frombuffer(frames, np.int32).reshape(-1, self._shape[1])
        first = 0 if len(table) == self._shape[0] else layer
        self._frame_table[first : first + len(table)] = table

    def _status(self) -> Status:
        advisor = self._advisor
        report = self._report() if self._is_report_due else None
        self._is_status_due = self._is_report_due = False
        wishes = Wishes(
            logits=advisor.wants_probabilities,
            gate_input=advisor.wants_gate_input,
            embeddings=self._wants_embeddings,
            layers_ahead=advisor.horizon.layers,
        )
        return Status(wishes, report)

    def _report(self) -> AdvisorReport:
        advisor = self._advisor
        quality = advisor.quality()
        return AdvisorReport(
            predictor=advisor.picked or "",
            reason=advisor.pick_reason,
            horizon_layers=advisor.horizon.layers,
            precision=quality.precision or 0.0,
            recall=quality.recall or 0.0,
            batch_accuracy=quality.batch_accuracy or 0.0,
            coverage={name: its.coverage for name, its in advisor.scores().items()},
            recall_by_layer=tuple(
                advisor.quality(layer=layer).recall or 0.0 for layer in range(self._shape[0])
            ),
        )


def advice_of(outlook: Outlook) -> Advice:
    return Advice(
        outlook.step,
        outlook.layer,
        array_bytes(outlook.probabilities, np.float32),
        outlook.wanted,
    )


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Over the last axis; also of no rows."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    probabilities: npt.NDArray[np.float32] = exponentials / exponentials.sum(-1, keepdims=True)
    return probabilities
