"""Steps that run without the host, one by one, in tests that are in the place of the device."""

from collections.abc import Generator
from contextlib import contextmanager

from sglmoe.worker.captured_steps import CapturedSteps


@contextmanager
def lent(steps: CapturedSteps, num_rows: int) -> Generator[bool, None, None]:
    """Whether frames are lent to a step of so many rows, which is over when this ends."""
    is_lent = steps.lend(num_rows)
    yield is_lent
    if is_lent:
        steps.queued()
        steps.take_back()
