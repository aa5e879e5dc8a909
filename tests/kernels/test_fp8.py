"""SGLang's grouped GEMM with fp8 weights in blocks, compiled ahead of time: which of the GPUs that we name can have it.

What the interpreter cannot show: it takes fp8 on any machine. `tests/kernels/test_layer.py` has the bits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglmoe.kernels.compile import CAPABILITIES
from sglmoe.supported_models import FP8_CAPABILITY

ROOT = Path(__file__).parents[2]
# Qwen3-30B-A3B-FP8's down projection with SGLang's default config: `get_default_config`.
COMPILE = """
import json, sys
import triton.language as tl
from sglang.kernels.ops.moe.fused_moe_triton_kernels import fused_moe_kernel
from sglmoe.kernels.compile import Specimen, compile_for, figures

absent = dict.fromkeys(("a_desc", "b_desc", "bias_ptr", "add_mask_ptr"))
block = {"group_n": 128, "group_k": 128}
tile = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 32}
kind = dict.fromkeys(("use_int8_w8a8", "use_int8_w8a16", "per_channel_quant"), False)
kind |= {"use_fp8_w8a8": True, "compute_type": tl.bfloat16, "even_Ks": True, "top_k": 1}
off = ("c_sorted", "swap_ab", "FUSE_ADD_TO_OUTPUT", "MASK_OUTPUT", "FUSE_SUM_ALL_REDUCE")
off += ("FUSE_SWIGLU", "USE_GDC", "GDC_EARLY")
rest = dict.fromkeys(off, False) | {"MUL_ROUTED_WEIGHT": True, "ROUTER_TOPK": 8}
rest |= {"A_OUTPUT_SLICES": 1, "A_OUTPUT_SLICE_WIDTH": 0, "A_OUTPUT_SLICE_K": 0}
ones = dict.fromkeys(("stride_ak", "stride_bk", "stride_cn"), 1)
constants = absent | block | tile | kind | rest | ones
pointers = "*fp8e4nv *fp8e4nv *bf16 *fp32 *fp32 *fp32 *i32 *i32 *i32"
numbers = len(fused_moe_kernel.arg_names) - len(constants) - len(pointers.split())
specimen = Specimen(fused_moe_kernel, f"{pointers}{' i32' * numbers}", constants)
found = {}
for capability in map(int, sys.argv[1:]):
    try:
        found[capability] = figures(compile_for(specimen, capability)).registers
    except Exception as error:
        found[capability] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[int, int | str]:
    """By compute capability: the registers of a thread, or why not."""
    environment = {name: its for name, its in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, *map(str, (*CAPABILITIES, 86))]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {int(name): its for name, its in json.loads(run.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("capability", [89, 90])
def test_gpus_with_fp8_have_the_kernel(compiled: dict[int, int | str], capability: int) -> None:
    registers = compiled[capability]
    assert isinstance(registers, int), registers
    assert 0 < registers <= 255


@pytest.mark.parametrize("capability", [80, 86])
def test_older_ones_do_not_which_is_why_they_are_refused(
    compiled: dict[int, int | str], capability: int
) -> None:
    """An A100, an RTX 3090. A Triton that compiles it for them makes `FP8_CAPABILITY` too strict."""
    assert "fp8e4nv not supported in this architecture" in str(compiled[capability])
    assert divmod(capability, 10) < FP8_CAPABILITY <= (8, 9)
