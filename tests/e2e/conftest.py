"""Fixtures of the end-to-end tests. See `forking` for how they share one import of SGLang."""

import pytest
from forking import preload


@pytest.fixture(scope="session")
def preloaded() -> None:
    """SGLang is imported in this process, and `forking.run_in_fork` finds it so."""
    preload()
