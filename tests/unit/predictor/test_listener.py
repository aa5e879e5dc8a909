"""From bytes to what predictors are told, and back: 2 layers of 4 experts, 2 tokens, a hidden size of 3."""

from typing import Any

import numpy as np
import pytest

from sglmoe.memory.experts import ABSENT
from sglmoe.memory.prefetch import Wanted
from sglmoe.prediction.advisor import QUALITY_STEPS, Advisor, LinkTimes
from sglmoe.prediction.predictor import LayerRouting, Scores, StepTokens
from sglmoe.predictor.listener import REPORT_STEPS, Listener, SentEmbeddings, softmax
from sglmoe.predictor.messages import (
    Advice,
    LayerRouted,
    Status,
    StepBegun,
    Wishes,
    array_bytes,
)

EMBEDDINGS = np.array([[1, 2, 3], [4, 5, 6]], np.float32)  # of tokens 70 and 7
GATE_INPUT = np.array([[0.5, 0, 0], [0, 0.25, 0]], np.float32)
LOGITS = np.log(np.array([[1, 2, 3, 4], [4, 4, 1, 1]], np.float32))


class Noting:
    """Is sure of expert 3 in both layers, and keeps what it is told."""

    def __init__(self, embeddings: SentEmbeddings | None = None, *, wants: bool = True):
        self.wants_gate_input = self.wants_probabilities = wants
        self.tokens: list[StepTokens] = []
        self.routing: list[LayerRouting] = []
        self.forgotten: list[int] = []
        self.looked_up: list[list[list[float]]] = []
        self._embed = embeddings
        self._scores: Scores = np.zeros((2, 4), np.float32)
        self._scores[:, 3] = 1

    def begin_step(self, tokens: StepTokens) -> None:
        self.tokens.append(tokens)
        if self._embed is not None:
            self.looked_up.append(self._embed(tokens.token_ids).tolist())

    def observe(self, routing: LayerRouting) -> None:
        self.routing.append(routing)

    def scores(self) -> Scores:
        return self._scores

    def forget(self, owner: int) -> None:
        self.forgotten.append(owner)


class Bench:
    def __init__(self, *, wants: bool = True):
        self.embeddings = SentEmbeddings(3)
        self.predictor = Noting(self.embeddings if wants else None, wants=wants)
        frame_table = np.full((2, 4), ABSENT, np.int32)
        advisor = Advisor({"noting": self.predictor}, Noting(wants=False), frame_table=frame_table)
        self.listener = Listener(advisor, frame_table, self.embeddings)

    def begin(
        self,
        step: int,
        *,
        frames: tuple[tuple[int, int], ...] = (),
        embeddings: bytes = EMBEDDINGS.tobytes(),
        wants_advice: bool = True,
    ) -> None:
        self.listener.hear(
            StepBegun(
                step=step,
                token_ids=array_bytes(np.array([70, 7]), np.int32),
                positions=array_bytes(np.array([5, 6]), np.int32),
                owners=array_bytes(np.array([1, 2]), np.int32),
                embeddings=embeddings,
                ended=[2],
                frames=table(*frames),
                times=LinkTimes(expert_seconds=0.001, layer_seconds=0.004),
                late=1,
                unused=2,
                wants_advice=wants_advice,
            )
        )

    def routed(self, layer: int, **fields: Any) -> None:
        its = {
            "expert_ids": array_bytes(np.array([[3, 1], [0, 3]]), np.int32),
            "logits": LOGITS.tobytes(),
            "gate_input": GATE_INPUT.tobytes(),
            "frames": table(),
        }
        self.listener.hear(LayerRouted(layer=layer, num_tokens=2, **its | fields))

    def status(self) -> Status:
        """What it says of the step first."""
        status = self.listener.answers()[0]
        assert isinstance(status, Status)
        return status

    def advice(self) -> Advice:
        advice = self.listener.answers()[-1]
        assert isinstance(advice, Advice)
        return advice

    def steps(self, count: int) -> None:
        """Both tokens choose expert 3, twice."""
        only_3 = array_bytes(np.full((2, 2), 3), np.int32)
        for number in range(count):
            self.begin(number)
            self.routed(0, expert_ids=only_3)
            self.routed(1, expert_ids=only_3)


def table(*experts: tuple[int, int]) -> bytes:
    """With these in frames."""
    its = np.full((2, 4), ABSENT, np.int32)
    for number, key in enumerate(experts):
        its[key] = number
    return its.tobytes()


def test_a_predictor_is_told_what_was_sent() -> None:
    bench = Bench()
    bench.begin(1)
    bench.routed(0)
    [tokens] = bench.predictor.tokens
    assert tokens.token_ids.tolist() == [70, 7]
    assert tokens.positions.tolist() == [5, 6]
    assert tokens.owners.tolist() == [1, 2]
    [routing] = bench.predictor.routing
    assert (routing.layer, routing.expert_ids.tolist()) == (0, [[3, 1], [0, 3]])
    assert routing.probabilities == pytest.approx(
        np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.4, 0.1, 0.1]])
    )
    assert routing.gate_input is not None
    assert routing.gate_input.tolist() == GATE_INPUT.tolist()
    assert bench.predictor.forgotten == [2]
    assert bench.predictor.looked_up == [EMBEDDINGS.tolist()]


def test_what_was_not_sent_is_of_no_token() -> None:
    bench = Bench(wants=False)
    bench.begin(1)
    bench.routed(0, logits=b"", gate_input=b"")
    [routing] = bench.predictor.routing
    assert routing.probabilities.shape == (0, 4)
    assert routing.gate_input is None


def test_embeddings_that_were_not_sent_are_zeros() -> None:
    bench = Bench()
    bench.begin(1)
    bench.begin(2, embeddings=b"")
    assert bench.predictor.looked_up == [EMBEDDINGS.tolist(), [[0, 0, 0]] * 2]
    assert bench.status().wishes.embeddings, "somebody has asked"
    bench.predictor._embed = None
    bench.begin(3)
    assert not bench.status().wishes.embeddings, "in this step nobody has"


def test_each_step_is_told_what_predictors_want_from_now_on() -> None:
    asking, modest = Bench(), Bench(wants=False)
    for bench in (asking, modest):
        bench.begin(1)
    assert asking.status().wishes == Wishes(True, True, True, layers_ahead=1)
    assert modest.status().wishes == Wishes(False, False, False, layers_ahead=1)


def test_the_advisor_hears_what_became_of_prefetches(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, heard = Bench(), {}
    monkeypatch.setattr(
        bench.listener._advisor, "begin_step", lambda *arguments, **named: heard.update(named)
    )
    bench.begin(1)
    assert heard == {"late": 1, "unused": 2}


def test_residents_are_not_wanted_and_no_misses() -> None:
    bench = Bench()
    bench.steps(50)
    bench.begin(50, frames=((0, 3),))
    assert bench.advice().wanted == []
    bench.begin(51)
    bench.routed(0, frames=table((1, 3)))
    assert bench.advice().wanted == []
    bench.begin(51, frames=((1, 3),))
    bench.routed(0, frames=table((1, 0), (1, 1)))
    advice = bench.advice()
    assert (advice.step, advice.layer) == (51, 0)
    assert advice.wanted == [Wanted(1, 3, pytest.approx(1, abs=0.1))]
    probabilities = np.frombuffer(advice.probabilities, np.float32).reshape(2, 4)
    assert probabilities[1, 3] == pytest.approx(1, abs=0.1)


def test_of_layers_that_nothing_is_said_of_the_last_word_holds() -> None:
    bench = Bench()
    bench.steps(50)
    for frames, wanted in ((((1, 3),), []), ((), [(1, 3)])):
        bench.begin(50, frames=frames)
        bench.routed(0, frames=array_bytes(np.array([7, ABSENT, ABSENT, ABSENT]), np.int32))
        assert [(its.layer, its.expert) for its in bench.advice().wanted] == wanted
    assert bench.listener._frame_table.tolist() == [[7, -1, -1, -1], [-1, -1, -1, -1]]
    bench.begin(51)
    assert bench.status().wishes.layers_ahead == 1


def test_a_report_comes_now_and_then() -> None:
    bench = Bench()
    bench.begin(1)
    first = bench.status().report
    assert first is not None
    assert first.predictor == "noting"
    bench.routed(0)
    bench.begin(2)
    assert bench.status().report is None
    bench.begin(REPORT_STEPS)
    bench.routed(0)  # it was behind, and says nothing of the step's begin
    report = bench.status().report
    assert report is not None
    assert (report.precision, report.recall) == (0.75, 1.0), "of all four, 0, 1 and 3 were used"
    assert len(report.recall_by_layer) == 2


def test_where_no_advice_is_taken_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor worked out, but in the steps whose plans are judged."""
    bench, outlooks = Bench(), []
    plan = bench.listener._advisor.outlook
    monkeypatch.setattr(bench.listener._advisor, "outlook", lambda: outlooks.append(step) or plan())
    for step in (QUALITY_STEPS - 1, QUALITY_STEPS):
        bench.begin(step, wants_advice=False)
        assert bench.listener.is_asked == (step == QUALITY_STEPS)
        assert [type(its) for its in bench.listener.answers()] == [Status]
        bench.routed(0)
        assert bench.listener.answers() == []
    assert outlooks == [QUALITY_STEPS] * 2
    bench.begin(QUALITY_STEPS + 1)
    assert bench.listener.is_asked
    assert [type(its) for its in bench.listener.answers()] == [Status, Advice]
    assert [type(its) for its in bench.listener.answers()] == [Advice]


def test_softmax_of_large_logits_and_of_none() -> None:
    assert softmax(np.array([[1e4, 0]], np.float32)).tolist() == [[1, 0]]
    assert softmax(np.zeros((0, 4), np.float32)).shape == (0, 4)
