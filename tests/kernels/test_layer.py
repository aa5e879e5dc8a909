"""A whole layer as on CUDA, in the interpreter: SGLang's fused MoE sequence out of frames has the bits of SGLang's own layer.

The memory manager brings experts into frames of an arena, in as many waves as they take. What SGLang has for GPUs alone is
stood in for: aligning, and the GPU's name, under which it looks configs up.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import pytest
import torch
from aligned import align
from int4_packing import quantise

from sglmoe.demo_model import DEMO_MODEL
from sglmoe.kernels.blocks import wave_blocks
from sglmoe.memory.arena import plan_geometry
from sglmoe.memory.expert_layout import W4A16, BlockFp8, ExpertFormat, ExpertLayout, Plain
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.store import ExpertStore
from sglmoe.memory.transfer import HostCopier
from sglmoe.worker import moe_layer_grouped
from sglmoe.worker.moe_layer import ExpertShape, PagedExperts
from sglmoe.worker.moe_layer_grouped import GroupedExperts

NUM_EXPERTS, HIDDEN, INNER = 8, 64, 32
PLAIN, FP8 = Plain("bfloat16"), BlockFp8(32, 32)
GPTQ, AWQ = W4A16("bfloat16", 32, False, "gptq"), W4A16("bfloat16", 32, True, "awq")


@pytest.fixture(autouse=True)
def stand_ins() -> Iterator[None]:
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe, fused_moe_triton_config
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path=str(DEMO_MODEL), device="cpu")
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))

    def aligned(ids: torch.Tensor, block_tokens: int, num_experts: int) -> tuple[torch.Tensor, ...]:
        routed = align(ids, block_tokens, num_experts)
        return routed.sorted_ids, routed.expert_ids, routed.num_padded

    with (
        patch.object(fused_moe, "moe_align_block_size", aligned),
        patch.object(fused_moe_triton_config, "get_device_name", lambda: "none"),
    ):
        yield


class Layer:
    """Random experts; those in frames come from a store, `num_frames` at a time."""

    def __init__(self, num_frames: int, its: ExpertFormat = PLAIN):
        random = torch.Generator().manual_seed(1)
        self.experts = PagedExperts(ExpertStore(), on_tensor=lambda: None)
        shape = ExpertShape(NUM_EXPERTS, HIDDEN, INNER, its)
        self.experts.add_layer(0, shape)
        self.layout = shape.layout
        for expert in range(NUM_EXPERTS):
            for part, tensor in random_parts(its, self.layout, random):
                if part in self.layout.part_offsets():
                    self.experts.take_tensor(0, expert, part, tensor)
        expert_bytes = self.layout.num_bytes
        geometry = plan_geometry(
            arena_bytes=(num_frames + 1) * (-(-expert_bytes // 256) * 256 + 256) - 256,
            expert_bytes=expert_bytes,
            token_bytes=256,
            token_rows=2,
            page_tokens=1,
        )
        assert geometry.num_frames == num_frames + 1  # one is KV's at most
        arena = torch.full((geometry.arena_bytes,), 255, dtype=torch.uint8)  # not a number
        store = self.experts.store
        copier = HostCopier(
            arena.numpy(), frame_bytes=geometry.frame_bytes, store=store, num_threads=1
        )
        self.memory = MemoryManager(
            geometry,
            num_layers=1,
            num_experts=NUM_EXPERTS,
            floor_frames=num_frames,
            load_experts=copier.load,
        )
        self.memory.admit("kv", bytes(4), "")
        assert self.memory.extend("kv", 1)  # so that experts have `num_frames`
        self.experts.attach(
            arena, geometry, frame_table=self.memory.frame_table, waves=self.memory.waves
        )
        assert self.experts._grouped is None  # a CPU
        assert self.experts._views is not None
        self.experts._grouped = GroupedExperts(self.experts._views, NUM_EXPERTS)

    def stock_tensors(self) -> dict[str, torch.Tensor]:
        """As SGLang would hold them: one of each name, contiguous, `[experts, rows, columns]`."""
        whole = np.empty((NUM_EXPERTS, self.layout.num_bytes), np.uint8)
        for expert in range(NUM_EXPERTS):
            self.experts.store.read(0, expert, whole[expert])
        found = {}
        for tensor in self.layout.tensors:
            raw = whole[:, tensor.offset : tensor.offset + tensor.num_bytes]
            values = torch.from_numpy(raw.copy()).view(getattr(torch, tensor.dtype))
            found[tensor.name] = values.view(NUM_EXPERTS, *tensor.shape)
        return found


def random_parts(
    its: ExpertFormat, layout: ExpertLayout, random: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """Of one expert, by the names of a checkpoint's tensors."""
    if not isinstance(its, W4A16):
        yield from ((part, random_part(layout, part, random)) for part in layout.part_offsets())
        return
    for matrix in ("w1", "w3", "w2"):
        shape = (HIDDEN, INNER) if matrix == "w2" else (INNER, HIDDEN)
        weights = torch.randn(shape, generator=random) / 8
        whole = quantise(weights, its.group, has_zeros=its.has_zeros, dtype=torch.float16)
        tensors = whole.in_gptq() if its.source == "gptq" else whole.in_awq()
        yield from ((f"{matrix}_{what}", tensor) for what, tensor in tensors.items())


def random_part(layout: ExpertLayout, part: str, random: torch.Generator) -> torch.Tensor:
    tensor = layout.tensor_of(part)
    values = torch.randn(tensor.part_shape, generator=random)
    if "scale" in part:
        return values.abs() / 8
    return (values if tensor.dtype.startswith("float8") else values / 8).to(
        getattr(torch, tensor.dtype)
    )


def stock_layer(layer: Layer, hidden: torch.Tensor, *routing: torch.Tensor, **options: Any) -> Any:
    """What `TritonMoeQuantInfo` of the stock method says goes to the stock layer."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    tensors = layer.stock_tensors()
    if "w13_qweight" in tensors:
        weights = tensors.pop("w13_qweight"), tensors.pop("w2_qweight")
        scales = {"w1_scale": "w13_scales", "w2_scale": "w2_scales"}
        if "w13_qzeros" in tensors:
            scales |= {"w1_zp": "w13_qzeros", "w2_zp": "w2_qzeros"}
        options |= {name: tensors.pop(its) for name, its in scales.items()}
        options |= {"use_int4_w4a16": True, "block_shape": [0, GPTQ.group]}
    else:
        weights = tensors.pop("w13_weight"), tensors.pop("w2_weight")
    if tensors:
        scales = {"w1_scale": "w13_weight_scale_inv", "w2_scale": "w2_weight_scale_inv"}
        options |= {name: tensors.pop(its) for name, its in scales.items()}
        options |= {"use_fp8_w8a8": True, "block_shape": [FP8.rows, FP8.columns]}
    assert not tensors
    return fused_moe.fused_experts_impl(hidden.clone(), *weights, *routing, **options)


def config(scaling: float | None) -> Any:
    return SimpleNamespace(
        activation="silu",
        is_gated=True,
        gemm1_alpha=None,
        gemm1_clamp_limit=None,
        swiglu_limit=None,
        routed_scaling_factor=scaling,
    )


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
