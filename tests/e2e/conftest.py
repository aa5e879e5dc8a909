"""Fixtures of the end-to-end tests. See `forking` for how they share one import of SGLang."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forking import preload

SETTLE_SECONDS = 5.0

# OpenMP's threads spin less long before they sleep, to the same bits. Two of them on two cores, one of which somebody else has,
# wait for each other: 21 requests to a tiny model took 35 s in the worst case, so 2.8 s, and on a machine that is free 0.8 s
# either way. Here, because it is read when torch is imported, by which time no test has been.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")


@pytest.fixture(scope="session")
def preloaded() -> None:
    """SGLang is imported in this process, and `forking.run_in_fork` finds it so."""
    preload()


def num_native_threads() -> int:
    """Those that Python did not start. One of Python's that is about to end counts for a moment."""
    return len(list(Path("/proc/self/task").iterdir())) - threading.active_count()


@pytest.fixture(autouse=True)
def session_does_not_compute() -> Iterator[None]:
    """A test that computes with torch in the session's process leaves threads that forks lack.

    Whichever fork computes next would hang. Red in the test that did it.
    """
    before = num_native_threads()
    yield
    deadline = time.monotonic() + SETTLE_SECONDS
    while num_native_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    grown = num_native_threads() - before
    assert grown <= 0, f"{grown} native threads were started: call run_in_fork(...) for this"
