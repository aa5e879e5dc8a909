"""What a captured layer launches, between its router and the sum of its experts, beside what SGLang's own does: in a graph each
small kernel costs 1.5 to 2 microseconds, whatever it does."""

from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from checkpoints import make_checkpoint
from cuda_device import Device
from forking import run_in_fork
from graphs_on_it import record_graphs
from loaded_worker import LoadedWorker
from sglang_on_it import sglang_on_it

from sglmoe.worker.captured_steps import CapturedSteps

pytestmark = pytest.mark.usefixtures("preloaded")

NUM_ROWS = 2
SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "moe_intermediate_size": 32}
# Routing, and the step's number behind it, on their way to the host.
MIRRORED = ["copy_"] * 4


class Launches(NamedTuple):
    stock: list[str]
    captured: list[list[str]]  # of each layer


def launches(model_dir: Path, *, expert_prefetch: str) -> Launches:
    captured, found = CapturedSteps.compute, []

    with sglang_on_it() as device:

        def compute(steps: CapturedSteps, *args: Any, **options: Any) -> torch.Tensor:
            before = len(device.launches)
            output = captured(steps, *args, **options)
            if device.capture is not None:
                found.append(device.launches[before:])
            return output

        with patch.object(CapturedSteps, "compute", compute):
            LoadedWorker(
                model_dir,
                host_memory="64MB",
                expert_prefetch=expert_prefetch,
                dtype="bfloat16",
                attention_backend="triton",
                cuda_graph_backend_decode="full",
                cuda_graph_bs_decode=[NUM_ROWS],
                before_loading=lambda: record_graphs(device),
            )
        return Launches(stock_launches(device), found)


def stock_launches(device: Device) -> list[str]:
    """Of SGLang's layer with all weights at hand, as its unquantised method calls it."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    hidden, inner, num_experts = SIZES["hidden_size"], SIZES["moe_intermediate_size"], 8
    w13 = torch.randn(num_experts, 2 * inner, hidden, dtype=torch.bfloat16, device="cuda")
    w2 = torch.randn(num_experts, hidden, inner, dtype=torch.bfloat16, device="cuda")
    rows = torch.randn(NUM_ROWS, hidden, dtype=torch.bfloat16, device="cuda")
    weights, ids = torch.rand(NUM_ROWS, num_experts, device="cuda").topk(4)
    routing = weights, ids.to(torch.int32)
    before = len(device.launches)
    fused_moe.fused_experts_impl(rows, w13, w2, *routing, inplace=True, filter_expert=False)
    return device.launches[before:]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, preloaded: None) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return run_in_fork(make_checkpoint, "qwen3_moe", folder, **SIZES)


def test_a_captured_layer_launches_one_kernel_more_than_a_stock_layer(model_dir: Path) -> None:
    its = run_in_fork(launches, model_dir, expert_prefetch="off")
    align, *products = its.stock
    assert align == "moe_align_block_size"
    assert products.count("fused_moe_kernel") == 2
    assert its.captured == [["dispatch_kernel", "page_in_kernel", *products]] * 2


def test_what_prefetching_adds_is_known(model_dir: Path) -> None:
    its = run_in_fork(launches, model_dir, expert_prefetch="on")
    layer = ["commit_kernel", "dispatch_kernel", *MIRRORED, "page_in_kernel", *its.stock[1:]]
    assert its.captured == [layer] * 2
