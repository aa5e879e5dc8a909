"""`make test-kernels` compiles every kernel for the GPUs we name; this says that none was forgotten."""

import ast
from pathlib import Path

from sglmoe.kernels.compile import SPECIMENS

KERNELS = Path(__file__).parents[2] / "sglmoe" / "kernels"


def kernels() -> set[str]:
    """The names of all functions of ours that are decorated with `triton.jit` and that no other such function calls."""
    functions = [
        node
        for path in KERNELS.glob("*.py")
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
