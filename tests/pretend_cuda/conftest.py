"""The worker on a CUDA device that is none (`cuda_device.py`): kernels in Triton's interpreter, in a process of their own."""

import os
import sys
from pathlib import Path

import pytest

assert "triton" not in sys.modules, "run tests/pretend_cuda on its own: pytest tests/pretend_cuda"
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "e2e"), str(TESTS / "kernels")]


@pytest.fixture(scope="session")
def preloaded() -> None:
    """SGLang is imported in this process, and `forking.run_in_fork` finds it so."""
    from forking import preload

    preload()
