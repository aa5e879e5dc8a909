"""SGLang's grouped GEMM reads experts out of frames and gets the same bits as from its own weights.

SGLang's kernel itself, in the interpreter: once with contiguous weights `[E, N, K]` and ids of experts, once with a view of an
arena whose frames lie in any order, with KV between them, and ids of frames.
"""

import pytest
import torch
import triton.language as tl
from aligned import Aligned, align, routings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vast import vast_bytes

from sglmoe.kernels.blocks import wave_blocks
from sglmoe.kernels.reference import frames_of_blocks
from sglmoe.memory.arena import plan_geometry
from sglmoe.memory.expert_layout import W4A16, BlockFp8, Plain, plan_layout
from sglmoe.worker.frame_views import FrameViews

N, K = 24, 40  # neither is a multiple of the block: edges are masked
FRAME = N * K + 16  # what lies behind an expert is not its own
CONFIG = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 16, "GROUP_SIZE_M": 1}


def gemm(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    routed: Aligned,
    *,
    blocks: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    output: torch.Tensor,
) -> None:
    """SGLang's call for `w13`: `[T * k, N]` in the order of pairs."""
    from sglang.kernels.ops.moe.fused_moe_triton_kernels import invoke_fused_moe_kernel

    sorted_ids, ids, num_padded = blocks
    top_k = routed.topk_ids.shape[1]
    invoke_fused_moe_kernel(
        hidden,
        weights,
        None,
        output,
        None,
        None,
        None,
        torch.linspace(0.1, 1, routed.num_pairs).view(-1, top_k),
        routed.topk_ids,
        sorted_ids,
        ids,
        num_padded,
        True,
        top_k,
        {**CONFIG, "BLOCK_SIZE_M": routed.block_tokens},
        compute_type=tl.bfloat16,
        use_fp8_w8a8=False,
        use_int8_w8a8=False,
        use_int8_w8a16=False,
        use_int4_w4a16=False,
        per_channel_quant=False,
    )


class Layer:
    """Weights of a layer's experts, and where they are in an arena of twice as many frames and one more."""

    def __init__(self, routed: Aligned, seed: int):
        random = torch.Generator().manual_seed(seed)
        num_frames = 2 * routed.num_experts + 1
        self.hidden = torch.randn(len(routed.topk_ids), K, generator=random).to(torch.bfloat16)
        self.weights = torch.randn(routed.num_experts, N, K, generator=random).to(torch.bfloat16)
        arena = torch.full((num_frames * FRAME,), float("nan"), dtype=torch.bfloat16)
        self.frames = arena.as_strided((num_frames, N, K), (FRAME, K, 1))
        order = torch.randperm(num_frames, generator=random)[: routed.num_experts]
        self.table = order.to(torch.int32)
        self.frames[order] = self.weights

    def stock(self, routed: Aligned) -> torch.Tensor:
        blocks = (routed.sorted_ids, routed.expert_ids, routed.num_padded)
        output = torch.zeros(routed.num_pairs, N, dtype=torch.bfloat16)
        gemm(self.hidden, self.weights, routed, blocks=blocks, output=output)
        return output


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(routed=routings(max_tokens=5), seed=st.integers(0, 2**31))
def test_frames_give_the_stock_layers_bits(routed: Aligned, seed: int) -> None:
    layer = Layer(routed, seed)
    ids = frames_of_blocks(routed.expert_ids, routed.num_padded, layer.table, routed.block_tokens)
    output = torch.zeros(routed.num_pairs, N, dtype=torch.bfloat16)
    blocks = (routed.sorted_ids, ids, routed.num_padded)
    gemm(layer.hidden, layer.frames, routed, blocks=blocks, output=output)
    assert torch.equal(output, layer.stock(routed))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(routed=routings(max_tokens=5), seed=st.integers(0, 2**31))
def test_two_waves_into_one_output_give_the_stock_layers_bits(routed: Aligned, seed: int) -> None:
    layer = Layer(routed, seed)
    is_first = torch.arange(routed.num_experts) % 2 == 0
    output = torch.zeros(routed.num_pairs, N, dtype=torch.bfloat16)
    for is_mine in (is_first, ~is_first):
        blocks = wave_blocks(
            routed.sorted_ids,
            routed.expert_ids,
            routed.num_padded,
            frame_table=torch.where(is_mine, layer.table, -1),
            block_tokens=routed.block_tokens,
            num_pairs=routed.num_pairs,
        )
        gemm(layer.hidden, layer.frames, routed, blocks=blocks, output=output)
    assert torch.equal(output, layer.stock(routed))


def test_an_absent_experts_rows_are_zeros_and_its_bytes_are_not_read() -> None:
    routed = align(torch.tensor([[0, 1], [1, 2]]), 16, 3)
    layer = Layer(routed, seed=0)
    layer.table[1] = -1
    ids = frames_of_blocks(routed.expert_ids, routed.num_padded, layer.table, 16)
    output = torch.full((4, N), 7, dtype=torch.bfloat16)
    blocks = (routed.sorted_ids, ids, routed.num_padded)
    gemm(layer.hidden, layer.frames, routed, blocks=blocks, output=output)
    stock = layer.stock(routed)
    assert torch.equal(output[[0, 3]], stock[[0, 3]])
    assert output[[1, 2]].eq(0).all()


def test_frames_beyond_2_31_elements_are_read() -> None:
    routed = align(torch.tensor([[0, 1]]), 16, 2)
    layer = Layer(routed, seed=1)
    arena = vast_bytes(2**32 + 2**20).view(torch.bfloat16)
    num_frames = len(arena) // FRAME
    frames = arena.as_strided((num_frames, N, K), (FRAME, K, 1))
    table = torch.tensor([num_frames - 1, 3], dtype=torch.int32)
    frames[table.long()] = layer.weights
    ids = frames_of_blocks(routed.expert_ids, routed.num_padded, table, 16)
    output = torch.zeros(2, N, dtype=torch.bfloat16)
    gemm(
        layer.hidden,
        frames,
        routed,
        blocks=(routed.sorted_ids, ids, routed.num_padded),
        output=output,
    )
    assert torch.equal(output, layer.stock(routed))


BF16, FP8 = Plain("bfloat16"), BlockFp8(128, 128)
GPTQ, AWQ = W4A16("bfloat16", 128, False, "gptq"), W4A16("bfloat16", 128, True, "awq")
MODELS = {  # weights, hidden, inner, experts, bytes of a token's KV in all layers, rows of it
    "Qwen3-30B-A3B": (BF16, 2048, 768, 128, 98304, 96),
    "Qwen3-30B-A3B-FP8": (FP8, 2048, 768, 128, 98304, 96),
    "Qwen3-30B-A3B-GPTQ-Int4": (GPTQ, 2048, 768, 128, 98304, 96),
    "Qwen3-30B-A3B-AWQ": (AWQ, 2048, 768, 128, 98304, 96),
    "Mixtral-8x7B": (BF16, 4096, 14336, 8, 131072, 64),
    "DeepSeek-V2-Lite": (BF16, 2048, 1408, 64, 31104, 27),
    "OLMoE-1B-7B": (BF16, 2048, 1024, 64, 131072, 32),
}


@pytest.mark.parametrize("model", MODELS)
def test_frames_run_the_very_code_that_the_stock_layer_runs(model: str) -> None:
    """What triton compiles a kernel for: the type of each argument, whether it is 1, whether 16 divides it. If all that is the
    same for stock weights and for the arena's views, it is one and the same binary, and only addresses differ."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    its, hidden, inner, num_experts, token_bytes, token_rows = MODELS[model]
    layout = plan_layout(its, hidden=hidden, inner=inner)
    geometry = plan_geometry(
        arena_bytes=2**36,
        expert_bytes=layout.num_bytes,
        token_bytes=token_bytes,
        token_rows=token_rows,
        page_tokens=None,
    )
    views = FrameViews(vast_bytes(geometry.arena_bytes), geometry, layout, its)
    for tensor in layout.tensors:
        stock = vast_bytes(num_experts * tensor.num_bytes).view(getattr(torch, tensor.dtype))
        stock = stock.view(num_experts, *tensor.shape)
        keys = [
            [
                native_specialize_impl(CUDABackend, argument, False, True, True)
                for argument in (array, *array.shape[1:], *array.stride())
            ]
            for array in (stock, views.tensors[tensor.name])
        ]
        assert keys[0] == keys[1]
