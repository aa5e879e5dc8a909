"""Between a step that runs without the host and the host: which prefetches have come, and what routers have said.

Letters (`kernels/mailbox.py`) tell the step of experts that have come. Each is for the step that ran when its expert was there:
what is read is an expert that the host took to be on its way all that step long. The other way the step copies what each layer
was routed to into host memory, and then its number, so whoever sees that sees the rest.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from sglmoe.kernels.mailbox import Mailbox, post
from sglmoe.memory.background_copier import Mark
from sglmoe.memory.device_transfer import OnStream, Stream
from sglmoe.memory.experts import Load
from sglmoe.worker.routed import Routed

NO_STEP = -1


class Letters:
    """To the step. Opened and closed by the main thread, written by whatever thread has brought an expert.

    `mark`: see `BackgroundCopier`; `stream`, `on_stream`: as of `StreamCopier`.
    """

    def __init__(
        self,
        num_layers: int,
        room: int,
        device: str,
        mark: Callable[[], Mark],
        *,
        stream: Stream | None = None,
        on_stream: OnStream = torch.cuda.stream,
    ):
        self.mailbox = Mailbox.empty(num_layers, room, device)
        self._stream: Any = stream or (None if device == "cpu" else torch.cuda.Stream())
        self._on_stream = on_stream
        self._step: int | None = None  # that runs; None between steps
        self._new_mark = mark
        self._mark: Mark = None  # in front of the step
        self._post(0, 0, 0, NO_STEP)  # compiles it, while nobody waits

    def open(self, step: int) -> None:
        """What comes from now on is told to this step, which is not queued yet. Memory has landed what had come."""
        self._mark = self._new_mark()
        self._step = step

    def mark(self) -> Mark:
        """What reads a frame's last tenant was queued before. Frames that are free while a step runs are no part of it, so what
        they are filled with need not wait for its end."""
        return self._new_mark() if self._step is None else self._mark

    def close(self) -> None:
        """The step is over."""
        self._step = None

    def came(self, load: Load) -> None:
        """The expert is in its frame, and the host has not been told."""
        step = self._step
        if step is None:
            return
        self._post(load.layer, load.expert, load.frame, step)

    def _post(self, layer: int, expert: int, frame: int, step: int) -> None:
        with nullcontext() if self._stream is None else self._on_stream(self._stream):
            post(self.mailbox, layer=layer, expert=expert, frame=frame, step=step)


class RoutingMirror:
    """From the step: what its routers have said, in host memory."""

    def __init__(self, num_layers: int, max_rows: int, device: str):
        self._room = (num_layers, max_rows)
        self._is_pinned = device != "cpu"
        self._tensors: list[torch.Tensor] = []  # ids, logits, hidden: [layers, rows, ...]
        self._done = self._empty((num_layers,), torch.int32)  # the step whose routing is there
        self._done_now = self._done.numpy()

    def copy(self, routing: Routed, step: torch.Tensor) -> None:
        """Queue the copies; to be captured, but for the first. `step`: int32 `[1]`, its number."""
        parts = (routing.ids, routing.logits, routing.hidden)
        if not self._tensors:
            self._tensors = [self._empty((*self._room, *its.shape[1:]), its.dtype) for its in parts]
        for mirrored, its in zip(self._tensors, parts, strict=True):
            mirrored[routing.layer, : len(its)].copy_(its, non_blocking=True)
        self._done[routing.layer : routing.layer + 1].copy_(step, non_blocking=True)

    def has(self, layer: int, step: int) -> bool:
        """Whether the step has come so far."""
        return bool(self._done_now[layer] == step)

    def routed(self, layer: int, num_rows: int) -> Routed:
        """Of this many rows; overwritten by the next step."""
        return Routed(layer, *(its[layer, :num_rows] for its in self._tensors))

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=self._is_pinned)
