"""A slower disk than there is, to measure with: reads share so many bytes a second."""

import threading
import time
from collections.abc import Callable

# In the environment of a server that is to have one: such as 200MB (a second).
READ_RATE = "SGLMOE_READ_RATE"


class ReadRate:
    """Any number of threads may ask; each is kept waiting until its bytes would have come."""

    def __init__(
        self,
        bytes_per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._bytes_per_second = bytes_per_second
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._idle_from = 0.0  # when all that was asked for so far has come

    def wait(self, num_bytes: int) -> None:
        """Return when so many more would have been read."""
        with self._lock:
            now = self._clock()
            self._idle_from = max(now, self._idle_from) + num_bytes / self._bytes_per_second
            seconds = self._idle_from - now
        self._sleep(seconds)
