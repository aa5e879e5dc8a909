"""What the compiler makes of the decoders, on a machine without a GPU: that it takes them is `make test-kernels`' business."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sglmoe.kernels.compile import SPECIMENS, compile_for
from sglmoe.kernels.exponent_codec.decode_gpu import NUM_WARPS, decode_tile
{code}
print(compiled.asm["ptx"])
"""
DECODE_TILE = """
types = ["*u8", "*i64", "*i16", "*i64", "i32"]
kernel = ASTSource(
    decode_tile,
    dict(zip(decode_tile.arg_names, types, strict=True)),
    attrs={(index,): [["tt.divisibility", 16]] for index in range(5)},  # as those of real tensors are
)
compiled = triton.compile(kernel, target=GPUTarget("cuda", ARCH, 32), options={"num_warps": NUM_WARPS})
"""
PAGE_IN_PACKED = """
(its,) = (its for its in SPECIMENS if its.kernel.__name__ == "page_in_packed_kernel")
compiled = compile_for(its, ARCH)
"""
WORDS = r"\b(ld|st)\.global\S*?((?:\.v\d)?\.b32)"


def moves(code: str, arch: int, tmp_path: Path) -> list[tuple[str, str]]:
    """Loads and stores of whole words in order. In a process of its own: this one interprets."""
    code = COMPILE.replace("{code}", code.replace("ARCH", str(arch)))
    environ = {name: its for name, its in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert run.returncode == 0, run.stderr
    return re.findall(WORDS, run.stdout)


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_the_decoder_compiles_and_moves_whole_words(arch: int, tmp_path: Path) -> None:
    """A thread's four values of a row are one load and one store."""
    found = moves(DECODE_TILE, arch, tmp_path)
    assert found.count(("ld", ".b32")) >= 3 + 8  # a, b, c, and the signs of eight rows
    assert found.count(("st", ".v2.b32")) == 8


@pytest.mark.parametrize("arch", [80, 90])
def test_page_in_asks_the_link_for_whole_tiles(arch: int, tmp_path: Path) -> None:
    """A thread's eight values of a row are one load and one store, and all loads of a tile come before its first store; tensors
    that are not coded, tile by tile too."""
    found = [its for its in moves(PAGE_IN_PACKED, arch, tmp_path) if its[1] != ".b32"]
    tile = [("ld", ".v2.b32")] * (3 + 8) + [("st", ".v4.b32")] * 8
    copied = [("ld", ".v4.b32")] * 8 + [("st", ".v4.b32")] * 8
    assert found == tile + copied
