"""The predictor's process: predictors compute beside the forward pass, in an interpreter of their own.

In a thread of the worker they cost a decode step of 48 layers x 128 experts and 16 requests 8 to 67 %
(`eval.prediction_overhead`): the forward pass's Python waits for theirs. Here it only says what happens.
"""

import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import numpy as np
import numpy.typing as npt
import setproctitle
from threadpoolctl import threadpool_limits

from sglmoe.prediction.advisor import Advisor, LinkTimes
from sglmoe.predictor.client import PredictorClient
from sglmoe.predictor.listener import Listener, SentEmbeddings
from sglmoe.predictor.messages import Answer, Closed, Event, Failed, LayerRouted, Ready, StepBegun
from sglmoe.predictor.ring import Ring, RingReceiver, RingSender
from sglmoe.start_up import ChildEntry

PROCESS_NAME = "sglmoe-predictor"
PROCESS_TITLE = "sglmoe::predictor"
# Where cores are short, the forward pass has them: a prediction comes late, or a step is not told.
NICENESS = 10
# Room for what has not been read: the gate inputs of 256 tokens for four layers of the widest models (7168 floats a
# token), and the advice for the largest (61 layers of 384 experts) 40 times. What is never needed is never touched.
EVENTS_BYTES = 32 << 20
ANSWERS_BYTES = 4 << 20
# Arbitrary: a process that is not there by then is not going to be.
START_SECONDS = 60.0
EXIT_SECONDS = 2.0
# While it starts, and only then, it is asked so often whether it is there.
POLL_SECONDS = 0.005
# Arbitrary, these four. In the midst of a step it looks for the next event so often, or, where nothing is asked of it, once
# in so many layers: the ring has room for four. At most so many times, which is the time of 8 layers or more; then it
# sleeps until it is woken, which is the sender's expense.
LOOKS_PER_LAYER = 8
LAYERS_PER_LOOK = 2
NUM_LOOKS = 64
LEAST_LOOK_SECONDS = 5e-5


class ProcessLine:
    """A predictor's process and the rings to it and back: a `client.Line`."""

    def __init__(self, process: BaseProcess, events: Ring, answers: Ring):
        self.process = process
        self._sender: RingSender[Event] = RingSender(events)
        self._receiver: RingReceiver[Answer] = RingReceiver(answers, Answer)

    def send(self, event: Event) -> bool:
        return self._sender.try_send(event)

    def receive(self) -> Answer | None:
        return self._receiver.receive_now()

    def wait_until_ready(self, seconds: float) -> None:
        """Until it has said its first word (`Ready`), has ended, or so long."""
        deadline = time.monotonic() + seconds
        while self.receive() is None and time.monotonic() < deadline:
            if wait([self.process.sentinel], POLL_SECONDS):
                return

    def death(self) -> str | None:
        if self.process.is_alive():
            return None
        return f"The predictor's process has ended (exit code {self.process.exitcode})."

    def close(self) -> None:
        self.process.join(EXIT_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(EXIT_SECONDS)


def start_predictor(
    advisor: Advisor, frame_table: npt.NDArray[np.int32], embeddings: SentEmbeddings
) -> PredictorClient:
    """Moves all three to a new process, which listens when this returns, or has failed."""
    events, answers = Ring(EVENTS_BYTES), Ring(ANSWERS_BYTES)
    process = multiprocessing.get_context("forkserver").Process(
        target=ChildEntry(__name__, "run_predictor"),
        args=(advisor, frame_table, embeddings, events, answers),
        name=PROCESS_NAME,
    )
    process.start()
    line = ProcessLine(process, events, answers)
    line.wait_until_ready(START_SECONDS)
    num_layers, num_experts = frame_table.shape
    return PredictorClient(line, num_layers=num_layers, num_experts=num_experts)


def run_predictor(
    advisor: Advisor,
    frame_table: npt.NDArray[np.int32],
    embeddings: SentEmbeddings,
    events: Ring,
    answers: Ring,
) -> None:
    """The process's target. `frame_table` is the one that the advisor reads."""
    receiver: RingReceiver[Event] = RingReceiver(events, Event)
    sender: RingSender[Answer] = RingSender(answers)
    compute_in_one_thread()
    setproctitle.setproctitle(PROCESS_TITLE)
    os.nice(NICENESS)
    try:
        sender.try_send(Ready())
        listen(Listener(advisor, frame_table, embeddings), receiver, sender)
    except Exception:
        sender.try_send(Failed(traceback.format_exc()))
    os._exit(0)


def listen(listener: Listener, events: RingReceiver[Event], answers: RingSender[Answer]) -> None:
    """Until the last event."""
    pace = LinkTimes(0.0, 0.0)
    event = events.receive()
    while True:
        match event:
            case StepBegun(times=times):
                listener.hear(event)
                pace = times
            case LayerRouted():
                listener.hear(event)
            case Closed():
                return
        following = events.receive_now()
        if following is None:  # else what it would say is out of date
            for answer in listener.answers():
                answers.try_send(answer)
            following = events.receive(
                num_looks=NUM_LOOKS, look_seconds=look_seconds(pace, is_asked=listener.is_asked)
            )
        event = following


def look_seconds(pace: LinkTimes, *, is_asked: bool) -> float:
    """How long to wait until looking again for what comes once in a layer's time."""
    num_layers = 1 / LOOKS_PER_LAYER if is_asked else LAYERS_PER_LOOK
    return max(LEAST_LOOK_SECONDS, pace.layer_seconds * num_layers)


def compute_in_one_thread() -> None:
    """Other cores are the forward pass's: with a second thread NumPy's products take its core away from it.

    One product took 0.3 ms in one thread and 7 ms in two, on two cores of which the forward pass had one.
    """
    threadpool_limits(1)
    if "torch" in sys.modules:  # the threads that are no library's
        sys.modules["torch"].set_num_threads(1)
