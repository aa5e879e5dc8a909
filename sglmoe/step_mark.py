"""Which step the worker is at, in memory that it shares with the scheduler: after a sudden death no message tells.

An answer that was sent just before may not have left the process; its loss must not put the blame on the step before.
"""

import mmap
import os
import weakref
from multiprocessing import reduction
from typing import Any


class StepMark:
    """A step's number, an int64, in memory without a name: nothing is left of it. May be handed to a process at its start."""

    def __init__(self) -> None:
        file = os.memfd_create("sglmoe-step")
        os.ftruncate(file, mmap.PAGESIZE)
        self._map(file)
        self.step_id = -1  # none yet

    @property
    def step_id(self) -> int:
        """Of the step that was begun last, -1 before the first one."""
        return self._number[0]

    @step_id.setter
    def step_id(self, step_id: int) -> None:
        self._number[0] = step_id

    def _map(self, file: int) -> None:
        self._file = file
        weakref.finalize(self, os.close, file)
        self._number = memoryview(mmap.mmap(file, mmap.PAGESIZE)).cast("q")

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self._file),)


def _received(file: Any) -> StepMark:
    """In the other process."""
    mark = StepMark.__new__(StepMark)
    mark._map(file.detach())
    return mark
