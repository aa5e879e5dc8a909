"""Kernels in Triton's interpreter: on a CPU, in a process of their own, as it decides when triton is imported."""

import os
import sys

assert "triton" not in sys.modules, "run tests/kernels on its own: pytest tests/kernels"
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
