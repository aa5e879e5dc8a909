"""Triton's interpreter in place of a GPU, for this folder alone: it has to be chosen before triton is imported."""

import os
import sys
from pathlib import Path

assert "triton" not in sys.modules, (
    "run this folder in a process of its own: pytest tests/kernels_codec"
)
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parents[1] / "kernels"))
