"""Which step the worker is at, in memory that it shares with the scheduler: after a sudden death no message tells.

An answer that was sent just before may not have left the process; its loss must not put the blame on the step before.
"""

from sglmoe.nameless_memory import NamelessMemory


class StepMark:
    """A step's number, an int64. May be handed to a process at its start."""

    def __init__(self) -> None:
        self._memory = NamelessMemory(8)
        self.step_id = -1  # none yet

    @property
    def step_id(self) -> int:
        """Of the step that was begun last, -1 before the first one."""
        return self._memory.bytes.cast("q")[0]

    @step_id.setter
    def step_id(self, step_id: int) -> None:
        self._memory.bytes.cast("q")[0] = step_id
