"""A whole layer as on CUDA, in the interpreter: SGLang's fused MoE sequence out of frames has the bits of SGLang's own layer.

The memory manager brings experts into frames of an arena, in as many waves as they take. What SGLang has for GPUs alone is
stood in for: aligning, and the GPU's name, under which it looks configs up.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from aligned import align

from sglmoe.demo_model import DEMO_MODEL
from sglmoe.kernels.blocks import wave_blocks
from sglmoe.memory.arena import plan_geometry
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.store import PARTS, ExpertStore
from sglmoe.memory.transfer import HostCopier
from sglmoe.worker import moe_layer_grouped
from sglmoe.worker.moe_layer import ExpertShape, PagedExperts
from sglmoe.worker.moe_layer_grouped import GroupedExperts

NUM_EXPERTS, HIDDEN, INNER = 8, 64, 32
SHAPE = ExpertShape(NUM_EXPERTS, HIDDEN, INNER, torch.bfloat16)


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

    def __init__(self, num_frames: int):
        random = torch.Generator().manual_seed(1)
        self.experts = PagedExperts(ExpertStore(), on_tensor=lambda: None)
        self.experts.add_layer(0, SHAPE)
        for expert in range(NUM_EXPERTS):
            for part in PARTS:
                matrix = torch.randn(SHAPE.part_shape(part), generator=random).bfloat16() / 8
                self.experts.take_tensor(0, expert, part, matrix)
        geometry = plan_geometry(
            arena_bytes=(num_frames + 1) * (SHAPE.expert_bytes + 256),
            expert_bytes=SHAPE.expert_bytes,
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
        self.experts._grouped = GroupedExperts(self.experts._w13, self.experts._w2, NUM_EXPERTS)

    def stock_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As SGLang would hold them."""
        whole = np.empty((NUM_EXPERTS, SHAPE.expert_bytes), np.uint8)
        for expert in range(NUM_EXPERTS):
            self.experts.store.read(0, expert, whole[expert])
        flat = torch.from_numpy(whole).view(torch.bfloat16)
        w13, w2 = flat.split([2 * INNER * HIDDEN, INNER * HIDDEN], dim=1)
        return (
            w13.contiguous().view(NUM_EXPERTS, 2 * INNER, HIDDEN),
            w2.contiguous().view(NUM_EXPERTS, HIDDEN, INNER),
        )


def config(scaling: float | None) -> Any:
    return SimpleNamespace(
        activation="silu",
        is_gated=True,
        gemm1_alpha=None,
        gemm1_clamp_limit=None,
        swiglu_limit=None,
        routed_scaling_factor=scaling,
    )


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
    num_frames: int, num_tokens: int, top_k: int, scaling: float | None
) -> None:
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    layer = Layer(num_frames)
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
        stock = fused_moe.fused_experts_impl(
            hidden.clone(),
            *layer.stock_weights(),
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
