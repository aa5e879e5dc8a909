"""What the C heap keeps though nobody uses it: long prompts leave holes in it that only a call gives back to the system."""

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress

# Arbitrary. A call takes some milliseconds, and what it has given back is soon asked for again.
TRIM_SECONDS = 30.0


class Heap:
    """The C library's, where it is glibc's; elsewhere nothing is given back."""

    def __init__(
        self,
        trim: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trim = trim or malloc_trim()
        self._clock = clock
        self._trimmed_at = clock()

    def step_done(self) -> None:
        """Between two steps: give back what is free, if that was long ago."""
        if self._clock() - self._trimmed_at >= TRIM_SECONDS:
            self._trim()
            self._trimmed_at = self._clock()


def malloc_trim() -> Callable[[], None]:
    with suppress(AttributeError):
        trim = ctypes.CDLL(None).malloc_trim
        return lambda: trim(0)
    return lambda: None
