"""Weights in 4 bits as SGLang has them: its own loader puts the same bits into its own weights as lie in frames, and Triton
compiles its kernel for the GPUs that we name. `tests/kernels/test_layer.py` has the layer's bits.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from int4_packing import Int4Weights, quantise

from sglmoe.int4_models import CAPABILITY
from sglmoe.kernels.compile import CAPABILITIES
from sglmoe.memory.store import ExpertStore
from sglmoe.worker.moe_layer import PagedExperts
from sglmoe.worker.moe_layer_method import make_paged_method, w4a16

ROOT = Path(__file__).parents[2]
NUM_EXPERTS, HIDDEN, INNER, GROUP = 3, 128, 64, 32
SHAPES = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
CONFIGS = {"gptq": GPTQ, "gptq-zeros": GPTQ | {"sym": False}, "awq": AWQ}


@pytest.fixture(autouse=True)
def on_a_gpu() -> Iterator[None]:
    """What SGLang asks about a machine before it takes AWQ, and where its loader puts tensors."""
    from sglang.srt.layers.quantization import moe_wna16

    parallel = SimpleNamespace(tp_group=SimpleNamespace(device="cpu"))
    with (
        patch.object(moe_wna16, "get_device_capability", lambda: (8, 0)),
        patch.object(moe_wna16, "get_parallel", lambda: parallel),
    ):
        yield


class Layer(torch.nn.Module):
    """As much of SGLang's FusedMoE as methods and loaders look at."""

    moe_tp_rank, moe_tp_size, layer_id = 0, 1, 0
    num_local_experts = NUM_EXPERTS
    intermediate_size_per_partition = INNER
    uses_expert_location = False
    moe_runner_config = SimpleNamespace(is_gated=True)

    def _map_global_expert_id_to_local_expert_id(self, expert: int) -> int:
        return expert


def place(
    param: torch.nn.Parameter, loaded: torch.Tensor, name: str, shard_id: str, expert: int
) -> None:
    """What FusedMoE's own loader comes to on one device: w1, and w3 below it."""
    start = INNER if shard_id == "w3" else 0
    param.data[expert, start : start + len(loaded)].copy_(loaded)


def load(method: Any, layer: Layer, tensors: dict[tuple[int, str, str], torch.Tensor]) -> None:
    """As models do: each tensor of the checkpoint goes to the parameter of its name."""
    method.create_weights(layer, NUM_EXPERTS, HIDDEN, INNER, torch.bfloat16, weight_loader=place)
    for (expert, shard_id, what), tensor in tensors.items():
        name = f"{'w2' if shard_id == 'w2' else 'w13'}_{what}"
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, f"experts.{name}", shard_id, expert)


def random_tensors(config: dict[str, Any]) -> dict[tuple[int, str, str], torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    has_zeros = bool(config.get("zero_point") or config.get("sym") is False)
    form: Callable[[Int4Weights], dict[str, torch.Tensor]]
    form = Int4Weights.in_awq if config["quant_method"] == "awq" else Int4Weights.in_gptq
    found = {}
    for expert in range(NUM_EXPERTS):
        for shard_id, shape in SHAPES.items():
            matrix = torch.randn(shape, generator=random)
            its = quantise(matrix, GROUP, has_zeros=has_zeros, dtype=torch.float16)
            found |= {(expert, shard_id, what): tensor for what, tensor in form(its).items()}
    return found


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("overflow", [False, True])
def test_frames_have_the_bits_of_sglangs_own_weights(name: str, overflow: bool) -> None:
    """`overflow`: zero points of 15 in a GPTQ checkpoint, which stand for 16 and are no number of 4 bits."""
    from sglang.srt.layers.quantization.moe_wna16 import MoeWNA16Config, MoeWNA16Method

    tensors = random_tensors(CONFIGS[name])
    if overflow:
        tensors = {
            key: torch.full_like(its, -1) if key[2] == "qzeros" else its
            for key, its in tensors.items()
        }
    config = MoeWNA16Config.from_config(dict(CONFIGS[name]))
    stock, paged = Layer(), Layer()
    load(MoeWNA16Method(config), stock, tensors)
    experts = PagedExperts(ExpertStore(), on_tensor=lambda: None)
    load(make_paged_method(MoeWNA16Method, experts, w4a16)(config), paged, tensors)
    experts.store.check_complete(1, NUM_EXPERTS)
    assert experts.layout is not None
    for expert in range(NUM_EXPERTS):
        frame = np.zeros(experts.layout.num_bytes, np.uint8)
        experts.store.read(0, expert, frame)
        for tensor in experts.layout.tensors:
            raw = frame[tensor.offset : tensor.offset + tensor.num_bytes]
            ours = torch.from_numpy(raw).view(getattr(torch, tensor.dtype)).view(tensor.shape)
            theirs = getattr(stock, tensor.name)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs[expert])
    with_bytes = {name for name, its in stock.named_parameters() if its.numel()}
    assert with_bytes == {tensor.name for tensor in experts.layout.tensors}
    assert dict(paged.named_parameters()).keys() == dict(stock.named_parameters()).keys()


def test_groups_out_of_order_are_refused_though_the_config_says_nothing_of_them() -> None:
    """SGLang does not look at them, and would answer garbage."""
    from sglang.srt.layers.quantization.moe_wna16 import MoeWNA16Config, MoeWNA16Method

    tensors = random_tensors(GPTQ)
    tensors[1, "w3", "g_idx"] = tensors[1, "w3", "g_idx"].flip(0)
    experts = PagedExperts(ExpertStore(), on_tensor=lambda: None)
    method = make_paged_method(MoeWNA16Method, experts, w4a16)
    with pytest.raises(ValueError, match=r"expert 1 of MoE layer 0: inputs of w3 .* desc_act"):
        load(method(MoeWNA16Config.from_config(dict(GPTQ))), Layer(), tensors)


# The down projection of Qwen3-30B-A3B-GPTQ-Int4 with SGLang's default config: `get_default_config`.
COMPILE = """
import json, sys
import triton.language as tl
from sglang.kernels.ops.moe.fused_moe_triton_kernels import fused_moe_kernel_gptq_awq
from sglmoe.kernels.compile import Specimen, compile_for, figures

tile = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 8}
rest = {"N": 2048, "K": 768, "group_size": 128, "top_k": 1, "compute_type": tl.bfloat16}
rest |= {"MUL_ROUTED_WEIGHT": True, "use_int4_w4a16": True, "use_int8_w8a16": False, "even_Ks": True}
rest |= dict.fromkeys(("stride_ak", "stride_bk", "stride_cn", "stride_bsk"), 1)
pointers = "*bf16 *u8 *bf16 *bf16 *u8 *fp32 *i32 *i32 *i32"
found = {}
for has_zp in (False, True):
    constants = tile | rest | {"has_zp": has_zp, "stride_bzk": int(has_zp)}
    if not has_zp:
        constants |= {"b_zp_ptr": None, "stride_bze": 0, "stride_bzn": 0}
    its = pointers if has_zp else pointers.replace(" *u8 *fp32", " *fp32")
    numbers = len(fused_moe_kernel_gptq_awq.arg_names) - len(constants) - len(its.split())
    specimen = Specimen(fused_moe_kernel_gptq_awq, f"{its}{' i32' * numbers}", constants)
    for capability in map(int, sys.argv[1:]):
        taken = figures(compile_for(specimen, capability))
        found[f"{capability} {has_zp}"] = (taken.registers, taken.local_bytes)
print(json.dumps(found))
"""


def test_triton_compiles_the_kernel_for_the_gpus_that_we_name() -> None:
    """What is interpreted here can't be compiled here, so another process does it."""
    environment = {name: its for name, its in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, *map(str, CAPABILITIES)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    compiled = json.loads(run.stdout.splitlines()[-1])
    assert len(compiled) == 2 * len(CAPABILITIES)
    assert all(0 < registers <= 255 and not spilled for registers, spilled in compiled.values())
    assert divmod(min(CAPABILITIES), 10) == CAPABILITY
