"""`make test-kernels` compiles every kernel for the GPUs we name; this says that none was forgotten, and
what the compiler must make of them."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglmoe.kernels.compile import SPECIMENS

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "sglmoe" / "kernels"


def kernels() -> set[str]:
    """The names of all functions of ours that are decorated with `triton.jit` and that no other such function calls."""
    functions = [
        node
        for path in KERNELS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    called = {
        node.func.id
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return {function.name for function in functions} - called


def test_every_kernel_is_compiled_ahead_of_time() -> None:
    assert {specimen.kernel.fn.__name__ for specimen in SPECIMENS} == kernels()


PTX = """
from sglmoe.kernels.compile import SPECIMENS, compile_for
for specimen in SPECIMENS:
    if specimen.kernel.__name__ in ("page_in_kernel", "post_kernel", "commit_kernel"):
        print(compile_for(specimen, {capability}).asm["ptx"])
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_the_compiler_keeps_what_the_interpreter_cannot_show(capability: int) -> None:
    """16 bytes a load, which a link to the host needs; release and acquire around letters. What is interpreted here can't be
    compiled here, so another process does it."""
    environment = {name: its for name, its in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PTX.format(capability=capability)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    moves = re.findall(r"(ld|st)\.global\S*\.v4\.b32", run.stdout)
    assert sorted(moves) == ["ld", "ld", "st", "st"]  # a chunk is two vectors a thread
    assert len(re.findall(r"atom\S*\.gpu\S*\.release\.exch", run.stdout)) == 1
    assert len(re.findall(r"\.gpu\S*\.acquire", run.stdout)) == 1
