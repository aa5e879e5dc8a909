"""Fixtures of the end-to-end tests. See `forking` for how they share one import of SGLang."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from forking import preload


@pytest.fixture(scope="session")
def preloaded() -> None:
    """SGLang is imported in this process, and `forking.run_in_fork` finds it so."""
    preload()


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.fixture(autouse=True)
def session_does_not_compute() -> Iterator[None]:
    """A test that computes with torch in the session's process leaves threads that forks lack.

    Whichever fork computes next would hang. Red in the test that did it.
    """
    foreign = num_threads() - threading.active_count()
    yield
    grown = num_threads() - threading.active_count() - foreign
    assert grown <= 0, f"{grown} native threads were started: call run_in_fork(...) for this"
