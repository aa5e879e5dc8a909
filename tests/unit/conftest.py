"""`--hypothesis-profile=long`: the random state machines run for minutes instead of seconds."""

import os

import pytest
from hypothesis import settings

# Before torch is imported. Threads that spin while they wait for each other take a hundred times as long on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test says how long an example may take: a busy machine decides that.
settings.register_profile("usual", deadline=None)
settings.register_profile("long", deadline=None)
settings.load_profile("usual")


def pytest_configure(config: pytest.Config) -> None:
    """A file or socket that is left to the garbage collector is a failure: of the test in which that comes."""
    for what in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning"):
        config.addinivalue_line("filterwarnings", f"error::{what}")
