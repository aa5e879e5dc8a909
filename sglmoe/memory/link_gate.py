"""Who may use the link that brings experts: demand before prefetch before what fills host memory."""

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from sglmoe.memory.experts import Load

Finish: TypeAlias = Callable[[], float]
# Begins to bring experts into their frames. None: they are there. Else what returns when they are,
# with the seconds that took since it began, or raises. If either raises, none of the frames may be used.
LoadExperts: TypeAlias = Callable[[Sequence[Load]], Finish | None]


class LinkGate:
    """Closed while loads of its priority are under way; lower ones wait, chunk by chunk.

    `above` is the gate of the next higher priority. One thread at a time closes it.
    """

    def __init__(self, above: "LinkGate | None" = None) -> None:
        self._above = above
        self._open = threading.Event()
        self._open.set()

    @contextmanager
    def closed(self) -> Generator[None, None, None]:
        """While loads of this priority are under way."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Whether no load of this or a higher priority is under way, at the latest after the timeout."""
        if self._above is not None and not self._above.wait(timeout_seconds):
            return False
        return self._open.wait(timeout_seconds)

    def guard(self, load: LoadExperts) -> LoadExperts:
        """`load` at this priority."""

        def load_first(loads: Sequence[Load]) -> Finish | None:
            self._open.clear()
            try:
                finish = load(loads)
            except BaseException:
                self._open.set()
                raise
            if finish is None:
                self._open.set()
                return None
            return lambda: self._finish(finish)

        return load_first

    def _finish(self, finish: Finish) -> float:
        try:
            return finish()
        finally:
            self._open.set()
