"""The Triton decoder compiles for the GPUs that it is meant for, on a machine without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sglmoe.kernels.exponent_codec.decode_gpu import NUM_WARPS, decode_tile
types = ["*u8", "*i64", "*i16", "*i64", "i32"]
kernel = ASTSource(
    decode_tile,
    dict(zip(decode_tile.arg_names, types, strict=True)),
    attrs={(index,): [["tt.divisibility", 16]] for index in range(5)},  # as those of real tensors are
)
compiled = triton.compile(kernel, target=GPUTarget("cuda", {arch}, 32), options={"num_warps": NUM_WARPS})
assert compiled.asm["cubin"]
ptx = compiled.asm["ptx"]
print(len(re.findall(r"ld\\.global\\S*\\.b32", ptx)), len(re.findall(r"st\\.global\\S*\\.v2\\.b32", ptx)))
"""


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_the_decoder_compiles_and_moves_whole_words(arch: int, tmp_path: Path) -> None:
    """In a process of its own: this one interprets. A thread's four values of a row are one load and one store."""
    code = COMPILE.replace("{arch}", str(arch))
    environ = {name: its for name, its in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert run.returncode == 0, run.stderr
    num_loads, num_stores = map(int, run.stdout.split())
    assert num_loads >= 3 + 8  # a, b, c, and the signs of eight rows
    assert num_stores == 8
