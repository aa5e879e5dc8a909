"""The predictor as a process of its own: told, answering, ended, killed."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import numpy as np
import psutil
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from sglmoe.memory.experts import ABSENT
from sglmoe.prediction.advisor import Advisor, LinkTimes, Outlook
from sglmoe.prediction.baselines import Frequency
from sglmoe.prediction.predictor import ModelParts, Predictor, StepTokens
from sglmoe.predictor.client import PredictorClient, Said
from sglmoe.predictor.listener import SentEmbeddings
from sglmoe.predictor.messages import LayerRouted, StepBegun, array_bytes
from sglmoe.predictor.process import ProcessLine, start_predictor
from sglmoe.predictor.ring import NUM_PLACES
from sglmoe.start_up import ChildEntry

WAIT_SECONDS = 30
PARTS = ModelParts(num_layers=2, num_experts=4, top_k=1)
NO_FRAMES = np.full((2, 4), ABSENT, np.int32).tobytes()


def begun(step: int) -> Said:
    number = array_bytes(np.zeros(1), np.int32)
    return Said(
        StepBegun(
            step=step,
            token_ids=number,
            positions=number,
            owners=number,
            embeddings=b"",
            ended=(),
            frames=NO_FRAMES,
            times=LinkTimes(0.001, 0.001),
            late=0,
            unused=0,
            wants_advice=True,
        )
    )


def routed(layer: int) -> Said:
    return Said(
        LayerRouted(
            layer=layer,
            num_tokens=1,
            expert_ids=array_bytes(np.full(1, 3), np.int32),
            logits=b"",
            gate_input=b"",
            frames=NO_FRAMES,
        )
    )


class Bench:
    def __init__(self, predictor: Predictor | None = None) -> None:
        frame_table = np.full((2, 4), ABSENT, np.int32)
        advisor = Advisor(
            {"frequency": predictor or Frequency(PARTS)}, Frequency(PARTS), frame_table=frame_table
        )
        self.client: PredictorClient = start_predictor(advisor, frame_table, SentEmbeddings(2))
        line = self.client._line
        assert isinstance(line, ProcessLine)
        self.line = line

    def step(self, number: int) -> None:
        for said in (begun(number), routed(0), routed(1)):
            self.client.tell(said)

    def outlook_after(self, step: int, layer: int) -> Outlook:
        found: list[Outlook] = []

        def has_come() -> bool:
            outlook = self.client.outlook()
            if outlook is not None and (outlook.step, outlook.layer) == (step, layer):
                found.append(outlook)
            return bool(found)

        eventually(has_come)
        return found[0]


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def bench() -> Iterator[Bench]:
    its = Bench()
    yield its
    if its.line.process.is_alive():
        its.client.close()
    assert not its.line.process.is_alive()


def test_it_learns_and_says_what_is_next(bench: Bench) -> None:
    for step in range(20):
        bench.step(step)
        bench.outlook_after(step, 1)
    bench.client.tell(begun(20))
    outlook = bench.outlook_after(20, -1)
    assert outlook.probabilities[:, 3].min() > 0.8
    assert (outlook.wanted[0].layer, outlook.wanted[0].expert) == (0, 3)
    assert bench.client.report.predictor == "frequency"
    assert not bench.client.wishes.logits
    bench.client.close()
    assert bench.line.process.exitcode == 0, "it ends when it is told to"


def test_one_that_stands_still_is_not_waited_for(bench: Bench) -> None:
    pid = bench.line.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    for step in range(4 * NUM_PLACES):
        bench.step(step)
    assert bench.client.num_skipped > NUM_PLACES
    assert not bench.client.failed
    os.kill(pid, signal.SIGCONT)

    def is_told_again() -> bool:
        before = bench.client.num_skipped
        bench.step(10_000)
        return bench.client.num_skipped == before

    eventually(is_told_again)
    bench.outlook_after(10_000, 1)


def test_one_that_is_killed_is_given_up(bench: Bench) -> None:
    bench.line.process.kill()

    def is_given_up() -> bool:
        bench.step(1)
        return bench.client.failed

    eventually(is_given_up)
    bench.step(2)
    assert bench.client.outlook() is None


def start_and_stay(told: Connection) -> None:
    """A worker: it has a predictor that waits, and does nothing."""
    told.send(Bench().line.process.pid)
    told.recv()


def test_one_that_waits_dies_with_its_worker() -> None:
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("forkserver").Process(
        target=ChildEntry(__name__, "start_and_stay"), args=(theirs,)
    )
    worker.start()
    pid = ours.recv()
    worker.kill()
    eventually(lambda: not psutil.pid_exists(pid))
    worker.join()


class Failing(Frequency):
    def begin_step(self, tokens: StepTokens) -> None:
        raise RuntimeError("a bug")


def fail(bench: Bench) -> None:
    """Have it tell why it does."""
    bench.step(1)

    def is_given_up() -> bool:
        bench.client.outlook()
        return bench.client.failed

    eventually(is_given_up)


class Counting(Frequency):
    """Arrives in a process whose libraries have two threads, as with two cores, and says how many they have then."""

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ = state
        threadpool_limits(2)

    def begin_step(self, tokens: StepTokens) -> None:
        by_library = {its["filepath"]: its["num_threads"] for its in threadpool_info()}
        assert by_library
        raise RuntimeError(f"threads: {set(by_library.values())}")


def test_it_leaves_the_other_cores_alone(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(Counting(PARTS))
    fail(bench)
    assert "threads: {1}" in caplog.text
    bench.client.close()


def test_one_that_fails_says_why(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(Failing(PARTS))
    fail(bench)
    assert "a bug" in caplog.text
    bench.client.close()
