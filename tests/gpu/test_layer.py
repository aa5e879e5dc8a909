"""What serves on CUDA: a layer out of frames, in waves or dispatched on the device, has the bits of SGLang's own. Skipped
without a GPU.

Sizes are those of Qwen3-30B-A3B's layers, in bf16, fp8, GPTQ and AWQ, with fewer experts.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglmoe.demo_model import DEMO_MODEL
from sglmoe.kernels.dispatch import Dispatched, dispatch
from sglmoe.kernels.residency import DeviceResidency, PageIns
from sglmoe.memory.arena import plan_geometry
from sglmoe.memory.expert_layout import W4A16, BlockFp8, ExpertFormat, Plain, plan_layout
from sglmoe.worker.frame_views import FrameViews
from sglmoe.worker.moe_layer_grouped import GroupedExperts

DEVICE = "cuda"
EXPERTS, TOP_K, HIDDEN, INNER = 32, 8, 2048, 768
PLAIN, FP8 = Plain("bfloat16"), BlockFp8(128, 128)
GPTQ, AWQ = W4A16("bfloat16", 128, False, "gptq"), W4A16("bfloat16", 128, True, "awq")
CONFIG = SimpleNamespace(
    activation="silu",
    is_gated=True,
    gemm1_alpha=None,
    gemm1_clamp_limit=None,
    swiglu_limit=None,
    routed_scaling_factor=None,
)
MATRICES = {"w1": "w13", "w2": "w2"}  # as SGLang's functions call them, and its parameters
has_gpu = torch.cuda.is_available()
has_fp8 = has_gpu and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu, reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def server_args() -> None:
    """What SGLang's layers look up; any model will do. Plugins may know of kernels that are compiled already."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    server_args = ServerArgs(model_path=str(DEMO_MODEL), attention_backend="triton")
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))


def random_tensor(name: str, dtype: str, shape: tuple[int, int]) -> torch.Tensor:
    """Of all experts, as the stock layer has it."""
    if dtype == "uint8":  # weights and zero points
        return torch.randint(0, 256, (EXPERTS, *shape), dtype=torch.uint8, device=DEVICE)
    values = torch.randn(EXPERTS, *shape, device=DEVICE)
    if "scale" in name:
        return (values.abs() * 0.02).to(getattr(torch, dtype))
    return (values if dtype.startswith("float8") else values * 0.02).to(getattr(torch, dtype))


def dispatch_all(
    ids: torch.Tensor, table: torch.Tensor, num_rows: int, block_tokens: int
) -> Dispatched:
    """All experts are where the table says."""
    state = DeviceResidency.empty(1, EXPERTS, EXPERTS, DEVICE)
    state.frame_table.copy_(table.view(1, -1))
    return dispatch(
        ids,
        0,
        num_rows=torch.tensor([num_rows], dtype=torch.int32, device=DEVICE),
        state=state,
        page_ins=PageIns(*(torch.zeros_like(its) for its in (table, table, table[:1]))),
        ids=torch.empty_like(ids),
        block_tokens=block_tokens,
    )


@pytest.mark.parametrize(
    "its",
    [
        pytest.param(PLAIN, id="plain"),
        pytest.param(
            FP8, id="fp8", marks=pytest.mark.skipif(not has_fp8, reason="needs capability 8.9")
        ),
        pytest.param(GPTQ, id="gptq"),
        pytest.param(AWQ, id="awq"),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 600])
@pytest.mark.usefixtures("server_args")
def test_frames_give_the_stock_layers_bits(num_tokens: int, its: ExpertFormat) -> None:
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    torch.manual_seed(3)
    layout = plan_layout(its, hidden=HIDDEN, inner=INNER)
    geometry = plan_geometry(
        arena_bytes=(2 * EXPERTS + 1) * (layout.num_bytes + 98304),
        expert_bytes=layout.num_bytes,
        token_bytes=98304,
        token_rows=96,
        page_tokens=1,
    )
    arena = torch.full((geometry.arena_bytes,), 255, dtype=torch.uint8, device=DEVICE)
    views = FrameViews(arena, geometry, layout, its)
    table = torch.randperm(geometry.num_frames, device=DEVICE)[:EXPERTS].to(torch.int32)
    stock = {t.name: random_tensor(t.name, t.dtype, t.shape) for t in layout.tensors}
    for name, tensor in stock.items():
        for expert, frame in enumerate(table.tolist()):
            views.tensors[name][frame].copy_(tensor[expert])
    hidden = torch.randn(num_tokens, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    weights, ids = torch.rand(num_tokens, EXPERTS, device=DEVICE).topk(TOP_K)
    ids = ids.to(torch.int32)
    needed = ids.unique().cpu().numpy()
    grouped = GroupedExperts(views, EXPERTS)
    output = grouped.forward(
        hidden,
        weights,
        ids,
        waves=[needed[:3], needed[3:]],
        frame_of=table.cpu().numpy(),
        config=CONFIG,
    )
    options: dict[str, Any] = {"inplace": True, "filter_expert": False}
    if its == FP8:
        options |= {"use_fp8_w8a8": True, "block_shape": [FP8.rows, FP8.columns]}
        options |= {f"{m}_scale": stock[f"{w}_weight_scale_inv"] for m, w in MATRICES.items()}
    if isinstance(its, W4A16):
        options |= {"use_int4_w4a16": True, "block_shape": [0, its.group]}
        options |= {f"{m}_scale": stock[f"{w}_scales"] for m, w in MATRICES.items()}
        options |= {f"{m}_zp": stock.get(f"{w}_qzeros") for m, w in MATRICES.items()}
    matrices = [stock.get(f"{w}_weight", stock.get(f"{w}_qweight")) for w in MATRICES.values()]
    expected = fused_moe.fused_experts_impl(hidden.clone(), *matrices, weights, ids, **options)
    assert torch.equal(output, expected)
    num_real = max(1, num_tokens - 3)  # the others pad the step
    dispatched = dispatch_all(ids, table, num_real, grouped.block_tokens(hidden, ids))
    output = grouped.forward_dispatched(hidden, weights, ids, dispatched, config=CONFIG)
    assert torch.equal(output[:num_real], expected[:num_real])
    assert not output[num_real:].any()
