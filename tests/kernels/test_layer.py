"""A whole layer as on CUDA, in the interpreter: SGLang's fused MoE sequence out of frames has the bits of SGLang's own layer.

The memory manager brings experts into frames of an arena, in as many waves as they take.
"""

from collections.abc import Iterator
from typing import Literal
from unittest.mock import patch

import pytest
import torch
from paged_layer import (
    AWQ,
    FP8,
    GPTQ,
    HIDDEN,
    INNER,
    NUM_EXPERTS,
    PLAIN,
    Layer,
    config,
    stand_ins,
    stock_layer,
)

from sglmoe.kernels.blocks import wave_blocks
from sglmoe.memory.expert_layout import W4A16, ExpertFormat
from sglmoe.worker import moe_layer_grouped


@pytest.fixture(autouse=True)
def on_a_gpu() -> Iterator[None]:
    with stand_ins():
        yield


@pytest.mark.parametrize("its", [PLAIN, FP8, GPTQ, AWQ], ids=["plain", "fp8", "gptq", "awq"])
@pytest.mark.parametrize(
    ("num_frames", "num_tokens", "top_k", "scaling"),
    [
        (8, 1, 2, None),
        (8, 5, 3, None),
        (3, 5, 3, 2.5),
        (2, 7, 8, None),  # all experts for each token, in four waves
        (1, 3, 1, 1.5),  # without a factor stock writes no sum, and off CUDA one of nothing
        (4, 20, 2, None),
    ],
)
def test_any_waves_have_the_stock_layers_bits(
    num_frames: int, num_tokens: int, top_k: int, scaling: float | None, its: ExpertFormat
) -> None:
    layer = Layer(num_frames, its)
    random = torch.Generator().manual_seed(2)
    hidden = torch.randn(num_tokens, HIDDEN, generator=random).bfloat16()
    weights, ids = torch.rand(num_tokens, NUM_EXPERTS, generator=random).topk(top_k)
    ids = ids.to(torch.int32)
    for _ in range(2):  # whatever is resident by now
        layer.memory.begin_step()
        with patch.object(moe_layer_grouped, "wave_blocks", wraps=wave_blocks) as waves:
            output = layer.experts.forward(
                0, hidden, weights, ids, config=config(scaling), activation=torch.nn.Identity()
            )
        stock = stock_layer(
            layer,
            hidden,
            weights,
            ids,
            inplace=True,
            filter_expert=False,
            routed_scaling_factor=scaling,
        )
        assert torch.equal(output, stock)
        tables = [call.kwargs["frame_table"] for call in waves.call_args_list]
        computed = torch.cat([(table >= 0).nonzero().flatten() for table in tables])
        assert sorted(computed.tolist()) == ids.unique().tolist()  # each of them once
    num_waves = layer.memory.snapshot(0).num_waves
    assert num_waves == 2 * -(-len(ids.unique()) // num_frames) or num_frames == NUM_EXPERTS


@pytest.mark.parametrize("num_frames", [8, 2])
def test_fp8_out_of_frames_is_what_it_stands_for(num_frames: int) -> None:
    """Products of dequantised weights and activations in float32. SGLang rounds activations to fp8 with a CUDA kernel, whose
    stand-in off CUDA truncates in the interpreter; here torch rounds them. Blocks have scales of their own, so one that is
    taken for another shows.
    """
    from sglang.kernels.ops.moe import fused_moe_triton_kernels

    layer = Layer(num_frames, FP8)
    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, HIDDEN, generator=random).bfloat16()
    weights, ids = torch.rand(6, NUM_EXPERTS, generator=random).topk(3)
    ids = ids.to(torch.int32)
    with patch.object(fused_moe_triton_kernels, "per_token_group_quant_fp8", in_groups):
        output = layer.experts.forward(
            0, hidden, weights, ids, config=config(None), activation=torch.nn.Identity()
        )
    tensors = layer.stock_tensors()
    w13, w2 = (dequantised(tensors, name) for name in ("w13", "w2"))
    expected = torch.zeros(6, HIDDEN)
    for token in range(6):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up = truncated(w13[expert] @ rounded(hidden[token])).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            expected[token] += truncated(weight * (w2[expert] @ rounded(inner)))
    assert torch.allclose(output.float(), expected, rtol=0.01, atol=0.01 * float(expected.std()))


@pytest.mark.parametrize("source", ["gptq", "awq"])
def test_int4_out_of_frames_is_what_it_stands_for(source: Literal["gptq", "awq"]) -> None:
    """What a CPU makes of the same frames. In float16: of bfloat16 the interpreter multiplies bits as if they were numbers."""
    layer = Layer(2, W4A16("float16", 32, source == "awq", source))
    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, HIDDEN, generator=random).half()
    weights, ids = torch.rand(6, NUM_EXPERTS, generator=random).topk(3)
    ids = ids.to(torch.int32)
    output = layer.experts.forward(
        0, hidden, weights, ids, config=config(None), activation=torch.nn.Identity()
    )
    by_expert = layer.experts.forward_by_expert(0, hidden, weights, ids, silu_and_mul)
    assert by_expert.std() > 0.05
    assert torch.allclose(output, by_expert, rtol=0.002, atol=0.002 * float(by_expert.std()))


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x[..., :INNER]) * x[..., INNER:]


def in_groups(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8, and the scale of each group, under which its largest number is fp8's largest."""
    groups = x.float().unflatten(-1, (-1, group))
    scales = groups.abs().amax(dim=-1).clamp(min=1e-10) / 448
    return (groups / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2), scales


def rounded(row: torch.Tensor) -> torch.Tensor:
    values, scales = in_groups(row, FP8.columns)
    return values.float() * scales.repeat_interleave(FP8.columns)


def dequantised(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    scale = tensors[f"{name}_weight_scale_inv"]
    scale = scale.repeat_interleave(FP8.rows, 1).repeat_interleave(FP8.columns, 2)
    return tensors[f"{name}_weight"].float() * scale


def truncated(values: torch.Tensor) -> torch.Tensor:
    """To bfloat16, as the interpreter does it."""
    return (values.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
