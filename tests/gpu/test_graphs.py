"""A served model whose decode steps are captured, and break at each MoE layer. Skipped without a GPU.

On a CPU the same runs on a stand-in for graphs: `tests/e2e/test_graphs.py`.
"""

import pytest
import torch

from eval.decode_graphs import measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_lone_requests_have_the_same_bits_out_of_graphs() -> None:
    """With half of the experts in frames: what a break pages in is there when it computes, and nothing overwrites it."""
    eager, captured = measure("disabled"), measure("breakable")
    assert captured.alone == eager.alone
    assert captured.expert_misses > 0
