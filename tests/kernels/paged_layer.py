"""A layer of random experts on paged memory, and SGLang's own layer of the same, in the interpreter.

What SGLang has for GPUs alone is stood in for: aligning, and the GPU's name, under which it looks configs up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from aligned import align
from int4_packing import quantise

from sglmoe.demo_model import DEMO_MODEL
from sglmoe.memory.arena import plan_geometry
from sglmoe.memory.expert_layout import W4A16, BlockFp8, ExpertFormat, ExpertLayout, Plain
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.store import ExpertStore
from sglmoe.memory.transfer import HostCopier
from sglmoe.worker.moe_layer import ExpertShape, PagedExperts
from sglmoe.worker.moe_layer_grouped import GroupedExperts

NUM_EXPERTS, HIDDEN, INNER = 8, 64, 32
PLAIN, FP8 = Plain("bfloat16"), BlockFp8(32, 32)
GPTQ, AWQ = W4A16("bfloat16", 32, False, "gptq"), W4A16("bfloat16", 32, True, "awq")


@contextmanager
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
    """Random experts; those in frames come from a store, `num_frames` at a time. `self.arena`: uint8."""

    def __init__(self, num_frames: int, its: ExpertFormat = PLAIN):
        random = torch.Generator().manual_seed(1)
        self.experts = PagedExperts(ExpertStore(), on_tensor=lambda: None)
        shape = ExpertShape(NUM_EXPERTS, HIDDEN, INNER, its)
        self.experts.add_layer(0, shape)
        self.format: Any = its
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
        self.geometry = geometry
        # Not a number.
        arena = self.arena = torch.full((geometry.arena_bytes,), 255, dtype=torch.uint8)
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
        assert self.experts.grouped is None  # a CPU
        assert self.experts._views is not None
        self.experts.grouped = GroupedExperts(self.experts._views, NUM_EXPERTS)

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
        options |= {"use_fp8_w8a8": True, "block_shape": [layer.format.rows, layer.format.columns]}
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
