"""A predictor in this process: what it is told and what it says is encoded and decoded as on the way to another."""

from collections import deque

import msgspec
import numpy as np

from sglmoe.prediction.advisor import Advisor
from sglmoe.predictor.client import PredictorClient
from sglmoe.predictor.listener import Listener, SentEmbeddings
from sglmoe.predictor.messages import Answer, Closed, Event, Failed

ENCODER = msgspec.msgpack.Encoder()
EVENTS: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


class Loopback:
    """A `client.Line` that hears at once, or when it is told to `go_on` if it `is_slow`."""

    def __init__(self, listener: Listener, *, max_waiting: int = 256):
        self.listener = listener
        self.is_slow = False
        self.end: str | None = None  # how it has ended
        self.closed = False
        self.told: list[Event] = []
        self._max_waiting = max_waiting
        self._events: deque[bytes] = deque()
        self._answers: deque[bytes] = deque()

    def send(self, event: Event) -> bool:
        if self.end is not None or len(self._events) >= self._max_waiting:
            return False
        self.told.append(event)
        self._events.append(ENCODER.encode(event))
        if not self.is_slow:
            self.go_on()
        return True

    def go_on(self) -> None:
        """Hear all there is, and then answer."""
        while self._events:
            event = EVENTS.decode(self._events.popleft())
            if isinstance(event, Closed):
                self.closed = True
                return
            try:
                self.listener.hear(event)
            except RuntimeError as error:
                self.say(Failed(str(error)))
                self.end = "dead"
                return
        for answer in self.listener.answers():
            self.say(answer)

    def say(self, answer: Answer) -> None:
        self._answers.append(ENCODER.encode(answer))

    def receive(self) -> Answer | None:
        return ANSWERS.decode(self._answers.popleft()) if self._answers else None

    def death(self) -> str | None:
        return self.end

    def close(self) -> None:
        self.end = "closed"


def loopback(
    advisor: Advisor, frame_table: np.ndarray, embeddings: SentEmbeddings | None = None
) -> tuple[PredictorClient, Loopback]:
    """`frame_table` is the one that the advisor reads."""
    line = Loopback(Listener(advisor, frame_table, embeddings or SentEmbeddings(2)))
    num_layers, num_experts = frame_table.shape
    return PredictorClient(line, num_layers=num_layers, num_experts=num_experts), line
