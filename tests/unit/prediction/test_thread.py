"""The predictor's thread: in order, never waited for, and no harm when it is slow or fails."""

import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from sglmoe.prediction.advisor import Advisor, LinkTimes, Outlook
from sglmoe.prediction.predictor import LayerRouting, Scores, StepTokens
from sglmoe.prediction.thread import (
    MAX_WAITING,
    SWITCH_SECONDS,
    LayerRouted,
    PredictorThread,
    StepBegun,
)

WAIT_SECONDS = 10
ABSENT = np.ones(4, np.bool_)


class Slow:
    """Waits for permission at each event."""

    wants_gate_input = False
    wants_probabilities = False

    def __init__(self) -> None:
        self.log: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.fails = False

    def _note(self, text: str) -> None:
        assert self.go_on.wait(WAIT_SECONDS)
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


def begun(step: int) -> StepBegun:
    one = np.full(1, step, np.int32)
    return StepBegun(step, StepTokens(one, one, one), LinkTimes(0.1, 0.1), 0, 0)


def routed(layer: int) -> LayerRouted:
    routing = LayerRouting(layer, np.array([[0]]), np.full((1, 4), 0.25))
    return LayerRouted(lambda: routing, ABSENT)


class Bench:
    def __init__(self) -> None:
        self.predictor = Slow()
        advisor = Advisor({"slow": self.predictor}, Slow(), frame_table=np.zeros((2, 4), np.int32))
        self.thread = PredictorThread(advisor)
        self.thread.start()

    def eventually(self, step: int, layer: int) -> Outlook:
        for _ in range(1000):
            outlook = self.thread.outlook()
            if outlook is not None and (outlook.step, outlook.layer) == (step, layer):
                return outlook
            threading.Event().wait(0.01)
        raise AssertionError(f"no outlook after layer {layer} of step {step}")


@pytest.fixture
def bench() -> Iterator[Bench]:
    its = Bench()
    yield its
    its.predictor.go_on.set()
    its.thread.close()


def test_an_outlook_is_there_once(bench: Bench) -> None:
    bench.thread.begin_step(begun(1))
    bench.eventually(1, -1)
    assert bench.thread.outlook() is None
    bench.thread.routed(routed(0))
    bench.eventually(1, 0)
    bench.thread.forget(1)
    bench.thread.routed(routed(1))
    bench.eventually(1, 1)
    assert bench.predictor.log == ["step 1", "layer 0", "forget 1", "layer 1"]


def test_it_gives_the_interpreter_back_long_before_a_layer_is_over(bench: Bench) -> None:
    assert sys.getswitchinterval() <= SWITCH_SECONDS
    assert SWITCH_SECONDS <= 1e-4


def test_a_slow_one_says_only_what_is_new(bench: Bench) -> None:
    bench.predictor.go_on.clear()
    bench.thread.begin_step(begun(1))
    bench.thread.routed(routed(0))
    assert bench.thread.outlook() is None, "nobody waits"
    bench.predictor.go_on.set()
    bench.eventually(1, 0)
    assert bench.thread.outlook() is None


def test_one_that_is_far_behind_is_told_of_whole_steps_or_not_at_all(bench: Bench) -> None:
    bench.predictor.go_on.clear()
    num_steps = MAX_WAITING // 3 + 10
    for step in range(num_steps):
        bench.thread.begin_step(begun(step))
        bench.thread.routed(routed(0))
        bench.thread.routed(routed(1))
    assert 0 < bench.thread.num_skipped < num_steps
    bench.predictor.go_on.set()
    last = num_steps - bench.thread.num_skipped - 1
    bench.eventually(last, 1)
    told = [[f"step {step}", "layer 0", "layer 1"] for step in range(last + 1)]
    assert bench.predictor.log == [text for step in told for text in step]
    bench.thread.begin_step(begun(1000))
    bench.eventually(1000, -1)


def test_one_that_fails_is_heard_no_more(bench: Bench) -> None:
    bench.predictor.fails = True
    bench.thread.begin_step(begun(1))
    for _ in range(1000):
        if bench.thread.failed:
            break
        threading.Event().wait(0.01)
    assert bench.thread.failed
    bench.thread.begin_step(begun(2))
    bench.thread.routed(routed(0))
    bench.thread.forget(1)
    assert bench.thread.outlook() is None
    assert bench.thread.num_skipped == 1
