"""The way to the predictor: in order, never waited for, and no harm when it is slow, fails or dies."""

import logging

import numpy as np
import pytest
from loopback import Loopback, loopback

from sglmoe.memory.experts import ABSENT
from sglmoe.prediction.advisor import Advisor, LinkTimes
from sglmoe.prediction.predictor import LayerRouting, Scores, StepTokens
from sglmoe.predictor.client import PredictorClient, Said
from sglmoe.predictor.messages import Event, LayerRouted, StepBegun, array_bytes

NO_FRAMES = np.full((2, 4), ABSENT, np.int32).tobytes()


class Noting:
    """Keeps what it is told, until it fails."""

    wants_gate_input = False
    wants_probabilities = False

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fails = False

    def _note(self, text: str) -> None:
        if self.fails:
            raise RuntimeError("a bug")
        self.log.append(text)

    def begin_step(self, tokens: StepTokens) -> None:
        self._note(f"step {tokens.token_ids[0]}")

    def observe(self, routing: LayerRouting) -> None:
        self._note(f"layer {routing.layer}")

    def scores(self) -> Scores:
        return np.zeros((2, 4), np.float32)

    def forget(self, owner: int) -> None:
        self._note(f"forget {owner}")


class OnItsWay:
    """Something that the device is still copying."""

    def __init__(self, its: Event):
        self._its = its
        self.has_come = False

    def is_there(self) -> bool:
        return self.has_come

    def event(self) -> Event:
        assert self.has_come, "its bytes are not there yet"
        return self._its


def begun(step: int, *ended: int) -> StepBegun:
    number = array_bytes(np.full(1, step), np.int32)
    return StepBegun(
        step=step,
        token_ids=number,
        positions=number,
        owners=number,
        embeddings=b"",
        ended=ended,
        frames=NO_FRAMES,
        times=LinkTimes(0.1, 0.1),
        late=0,
        unused=0,
        wants_advice=True,
    )


def routed(layer: int) -> LayerRouted:
    return LayerRouted(
        layer=layer,
        num_tokens=1,
        expert_ids=array_bytes(np.zeros(1), np.int32),
        logits=b"",
        gate_input=b"",
        frames=NO_FRAMES,
    )


class Bench:
    def __init__(self) -> None:
        self.predictor = Noting()
        frame_table = np.full((2, 4), ABSENT, np.int32)
        advisor = Advisor({"noting": self.predictor}, Noting(), frame_table=frame_table)
        self.client: PredictorClient
        self.line: Loopback
        self.client, self.line = loopback(advisor, frame_table)

    def tell(self, *events: Event) -> None:
        for event in events:
            self.client.tell(Said(event))

    def step(self, number: int) -> None:
        self.tell(begun(number), routed(0), routed(1))

    def place(self) -> tuple[int, int] | None:
        """Step and layer of the new outlook."""
        outlook = self.client.outlook()
        return outlook and (outlook.step, outlook.layer)


def test_an_outlook_is_there_once() -> None:
    bench = Bench()
    bench.tell(begun(1))
    assert bench.place() == (1, -1)
    assert bench.place() is None
    bench.tell(routed(0))
    assert bench.place() == (1, 0)
    bench.tell(routed(1), begun(2, 1))
    assert bench.place() == (2, -1), "the latest"
    assert bench.predictor.log == ["step 1", "layer 0", "layer 1", "forget 1", "step 2"]


def test_a_slow_one_says_only_what_is_new() -> None:
    bench = Bench()
    bench.line.is_slow = True
    bench.tell(begun(1), routed(0))
    assert bench.place() is None, "nobody waits"
    bench.line.go_on()
    assert bench.place() == (1, 0)
    assert bench.place() is None


def test_of_a_step_that_it_is_too_slow_for_it_hears_no_more() -> None:
    bench = Bench()
    bench.line.is_slow = True
    bench.line._max_waiting = 5
    for step in (1, 2, 3):
        bench.step(step)
    assert bench.client.num_skipped == 2
    bench.line.go_on()
    bench.tell(routed(1))
    bench.line.go_on()
    bench.tell(begun(4))
    bench.line.go_on()
    heard = ["step 1", "layer 0", "layer 1", "step 2", "layer 0", "step 4"]
    assert bench.predictor.log == heard, "no layer after one that is missing"


def test_what_is_on_its_way_from_the_device_keeps_its_place() -> None:
    bench = Bench()
    first, second = OnItsWay(routed(0)), OnItsWay(routed(1))
    bench.tell(begun(1))
    bench.client.tell(first)
    bench.client.tell(second)
    bench.tell(begun(2))
    second.has_come = True
    assert bench.place() == (1, -1)
    assert bench.predictor.log == ["step 1"]
    first.has_come = True
    assert bench.place() == (2, -1), "asking sends what has come"
    assert bench.predictor.log == ["step 1", "layer 0", "layer 1", "step 2"]


def test_one_that_fails_is_told_no_more(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.predictor.fails = True
    with caplog.at_level(logging.ERROR):
        bench.tell(begun(1))
        assert bench.place() is None
    assert bench.client.failed
    assert "serving goes on without. a bug" in caplog.text
    bench.predictor.fails = False
    bench.step(2)
    assert bench.place() is None
    assert bench.predictor.log == []
    assert bench.client.num_skipped == 0, "it is not behind, it is gone"


def test_one_that_has_died_without_a_word_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.step(1)
    bench.line.end = "The predictor's process has ended (exit code -9)."
    with caplog.at_level(logging.ERROR):
        bench.tell(begun(2))
        bench.client.check()
    assert bench.client.failed
    assert caplog.text.count("exit code -9") == 1


def test_one_that_dies_while_it_is_told_nothing_is_noticed_when_somebody_looks() -> None:
    bench = Bench()
    bench.client.check()
    assert not bench.client.failed
    bench.line.end = "dead"
    bench.client.check()
    assert bench.client.failed


def test_closing_says_so_first() -> None:
    bench = Bench()
    bench.client.close()
    assert bench.line.closed
