"""A served model whose decode steps are captured, with breaks at each MoE layer or whole. Skipped without a GPU.

On a CPU the same runs on a stand-in for graphs: `tests/e2e/test_graphs.py`.
"""

import pytest
import torch

from eval.decode_graphs import Found, measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def eager() -> Found:
    return measure("disabled")


@pytest.mark.parametrize(
    ("backend", "options"),
    [("breakable", {}), ("full", {}), ("full", {"expert_prefetch": "on"})],
    ids=["breakable", "full", "full-prefetching"],
)
def test_lone_requests_have_the_same_bits_out_of_graphs(
    eager: Found, backend: str, options: dict[str, str]
) -> None:
    """With half of the experts in frames: what is paged in is there when a layer computes, and nothing overwrites it."""
    captured = measure(backend, **options)
    assert captured.alone == eager.alone
    assert captured.expert_misses > 0
    assert (captured.followed_steps > 0) == (backend == "full" and not options)
