"""The predictor's process: predictors compute beside the forward pass, in an interpreter of their own.

In a thread of the worker they cost a decode step of 48 layers x 128 experts and 16 requests 8 to 67 %
(`eval.prediction_overhead`): the forward pass's Python waits for theirs. Here it only says what happens.
"""

import multiprocessing
import os
import sys
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import setproctitle
import zmq

from sglmoe.prediction.advisor import Advisor
from sglmoe.predictor.client import PredictorClient
from sglmoe.predictor.listener import Listener, SentEmbeddings
from sglmoe.predictor.messages import Answer, Closed, Event, Failed, LayerRouted, Ready, StepBegun
from sglmoe.start_up import ChildEntry
from sglmoe.transport import Receiver, Sender

PROCESS_NAME = "sglmoe-predictor"
PROCESS_TITLE = "sglmoe::predictor"
# Where cores are short, the forward pass has them: a prediction comes late, or a step is not told.
NICENESS = 10
# Arbitrary: so many events wait for the predictor before a step is not told; twice that, with what is in the sockets.
MAX_WAITING = 128
# Arbitrary: a process that is not there by then is not going to be.
START_SECONDS = 60.0
EXIT_SECONDS = 2.0


class ProcessLine:
    """A predictor's process and the sockets to it: a `client.Line`."""

    def __init__(self, process: BaseProcess, sender: Sender[Event], receiver: Receiver[Answer]):
        self.process = process
        self._sender = sender
        self._receiver = receiver

    def send(self, event: Event) -> bool:
        return self._sender.try_send(event)

    def receive(self) -> Answer | None:
        return self._receiver.receive_now()

    def wait_until_ready(self, seconds: float) -> None:
        """Until it listens, or has ended, or so long."""
        self._receiver.wait(seconds, self.process.sentinel)

    def death(self) -> str | None:
        if self.process.is_alive():
            return None
        return f"The predictor's process has ended (exit code {self.process.exitcode})."

    def close(self) -> None:
        self.process.join(EXIT_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(EXIT_SECONDS)
        self._sender.close()
        self._receiver.close()


def start_predictor(
    advisor: Advisor,
    frame_table: npt.NDArray[np.int32],
    embeddings: SentEmbeddings,
    *,
    context: zmq.Context[Any],
    directory: Path,
) -> PredictorClient:
    """Moves all three to a new process, which listens when this returns, or has failed. Sockets are made in `directory`."""
    events, answers = (f"ipc://{directory}/predictor-{name}" for name in ("events", "answers"))
    sender: Sender[Event] = Sender(context, events, bind=True, limit=MAX_WAITING)
    receiver: Receiver[Answer] = Receiver(context, answers, Answer, bind=True, limit=MAX_WAITING)
    process = multiprocessing.get_context("forkserver").Process(
        target=ChildEntry(__name__, "run_predictor"),
        args=(advisor, frame_table, embeddings, events, answers),
        name=PROCESS_NAME,
    )
    process.start()
    line = ProcessLine(process, sender, receiver)
    line.wait_until_ready(START_SECONDS)
    num_layers, num_experts = frame_table.shape
    return PredictorClient(line, num_layers=num_layers, num_experts=num_experts)


def run_predictor(
    advisor: Advisor,
    frame_table: npt.NDArray[np.int32],
    embeddings: SentEmbeddings,
    events_address: str,
    answers_address: str,
) -> None:
    """The process's target. `frame_table` is the one that the advisor reads."""
    context: zmq.Context[Any] = zmq.Context()
    receiver: Receiver[Event] = Receiver(
        context, events_address, Event, bind=False, limit=MAX_WAITING
    )
    sender: Sender[Answer] = Sender(context, answers_address, bind=False, limit=MAX_WAITING)
    compute_in_one_thread()
    setproctitle.setproctitle(PROCESS_TITLE)
    os.nice(NICENESS)
    try:
        sender.send(Ready())
        listen(Listener(advisor, frame_table, embeddings), receiver, sender)
    except Exception:
        sender.try_send(Failed(traceback.format_exc()))
    sender.close()
    receiver.close()
    context.term()
    os._exit(0)


def listen(listener: Listener, events: Receiver[Event], answers: Sender[Answer]) -> None:
    """Until the last event."""
    event = events.receive()
    while True:
        match event:
            case StepBegun() | LayerRouted():
                listener.hear(event)
            case Closed() | None:
                return
        event = events.receive_now()
        if event is None:  # else what it would say is out of date
            answers.try_send(listener.advice())
            event = events.receive()


def compute_in_one_thread() -> None:
    """Other cores are the forward pass's."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
