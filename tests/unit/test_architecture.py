"""Which part of sglmoe may import which. A new arrow is a design decision: edit the tables."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "sglmoe"

FOUNDATION = {"units", "errors", "config", "protocol"}
LAUNCH = {"checkpoint", "config", "demo_model", "errors", "flags", "machine", "start_up"}
LAUNCH |= {"decode_graphs", "int4_models", "supported_models"}
MAY_IMPORT = {  # part -> parts it may import, inside functions too
    "units": set(),
    "errors": {"units"},
    "flags": set(),
    "int4_models": {"errors"},
    "supported_models": {"errors", "int4_models"},
    "checkpoint": {"errors"},
    "packed_checkpoint": {"checkpoint", "config", "errors"},
    "pack": {"checkpoint", "packed_checkpoint", "kernels", "units", "errors"},
    "demo_model": set(),
    "cpu_gptq": {"kernels"},
    "cpu_kernels": {"kernels"},
    "cpu_platform": {"cpu_gptq", "cpu_kernels"},
    "config": {"units", "errors"},
    "machine": {"config"},
    "decode_graphs": {"config", "errors"},
    "protocol": {"units"},
    "transport": {"protocol"},
    "nameless_memory": set(),
    "step_mark": {"nameless_memory"},
    "kernels": {"units"},
    "memory": FOUNDATION | {"kernels"},
    "prediction": FOUNDATION | {"memory"},
    "predictor": FOUNDATION | {"memory", "nameless_memory", "prediction", "start_up"},
    "scheduler": FOUNDATION | {"transport", "step_mark", "live_view", "start_up"},
    "worker": FOUNDATION
    | {
        "transport",
        "step_mark",
        "memory",
        "prediction",
        "predictor",
        "kernels",
        "decode_graphs",
        "packed_checkpoint",
        "supported_models",
    },
    "start_up": {"machine"},
    "preload": {"scheduler", "worker"},
    "preparation": LAUNCH | {"plan"},
    "graceful_stop": set(),
    "live_view": {"units"},
    "top": {"live_view"},
    "plan": LAUNCH | {"memory", "kernels", "packed_checkpoint", "units"},
    "recipe": {"config", "machine", "plan", "units", "errors"},
    "launch_server": LAUNCH | {"graceful_stop", "live_view", "plan", "preparation", "units"},
    "engine": LAUNCH | {"preparation"},
}
DEVICE = {"torch", "triton"}
FORBIDDEN = {  # packages that a part must not see
    "errors": DEVICE | {"zmq", "sglang", "numpy"},
    "units": DEVICE | {"zmq", "sglang"},
    "flags": DEVICE | {"zmq", "sglang"},
    "int4_models": DEVICE | {"zmq", "sglang"},
    "supported_models": DEVICE | {"zmq", "sglang"},
    "checkpoint": DEVICE | {"zmq", "sglang"},
    "packed_checkpoint": DEVICE | {"zmq", "sglang"},
    "config": DEVICE | {"zmq", "sglang"},
    "decode_graphs": DEVICE | {"zmq", "sglang"},
    "recipe": DEVICE | {"zmq", "sglang"},
    "protocol": DEVICE | {"zmq", "sglang", "pickle"},
    "transport": DEVICE | {"sglang", "pickle"},
    "nameless_memory": DEVICE | {"zmq", "sglang", "pickle"},
    "step_mark": DEVICE | {"zmq", "sglang", "pickle"},
    "live_view": DEVICE | {"zmq", "sglang"},
    "top": DEVICE | {"zmq", "sglang"},
    "kernels": {"zmq", "sglang", "asyncio"},
    "memory": {"zmq", "sglang", "asyncio"},
    "prediction": {"zmq", "sglang", "asyncio"},
    "predictor": DEVICE | {"zmq", "sglang", "pickle", "asyncio"},
    "scheduler": DEVICE | {"sglang", "pickle"},
}
KNOWS_SGLANG = (  # the only files that do, as patterns
    "scheduler/frontend*.py",
    "worker/model_runner*.py",
    "worker/moe_layer*.py",
    "worker/sampling*.py",
    "worker/profiler.py",
    "cpu_gptq.py",
    "cpu_kernels.py",
    "cpu_platform.py",
    "engine.py",
    "graceful_stop.py",
    "launch_server.py",
    "live_view/routes.py",
    "preload.py",
    "preparation.py",
    "start_up.py",
)
# Hands SGLang a tensor because its message type asks for one (routed experts); computes nothing.
KNOWS_TORCH = ("scheduler/frontend_output.py",)
SOURCES = sorted(ROOT.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def knows_sglang(relative: Path) -> bool:
    return any(relative.match(pattern) for pattern in KNOWS_SGLANG)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    relative = path.relative_to(ROOT)
    part = relative.parts[0].removesuffix(".py")
    if relative.name == "__init__.py":
        lazy_export = (
            {"typing.TYPE_CHECKING", "sglmoe.engine.Engine"} if part == "__init__" else set()
        )
        assert imported_modules(path) <= lazy_export, f"{relative} imports nothing"
        return
    assert part in MAY_IMPORT, f"{relative}: no layer for it; add it to the table or find it a home"
    banned = FORBIDDEN.get(part, set())
    banned = banned - {"sglang"} if knows_sglang(relative) else banned | {"sglang"}
    if relative.as_posix() in KNOWS_TORCH:
        banned = banned - {"torch"}
    for module in imported_modules(path):
        top, _, rest = module.partition(".")
        if top == "sglmoe":
            allowed = MAY_IMPORT[part] | {part}
            assert rest.partition(".")[0] in allowed, f"{relative} may not import {module}"
        assert top not in banned, f"{relative} may not import {module}"


def test_the_named_exceptions_exist() -> None:
    named = KNOWS_SGLANG + KNOWS_TORCH
    unused = [p for p in named if not any(s.relative_to(ROOT).match(p) for s in SOURCES)]
    assert not unused, f"shrink the exceptions: nothing matches {unused}"


def test_packages_say_nothing_themselves() -> None:
    """Importing one module of a package must not run another."""
    for init in ROOT.glob("*/__init__.py"):
        assert init.read_text() == "", f"{init} is not empty"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, f"{path}: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            num_lines = node.end_lineno - node.lineno + 1
            assert num_lines <= 60, f"{path}:{node.lineno} {node.name} has {num_lines} lines"


@pytest.mark.parametrize("module", ["sglmoe", "sglmoe.scheduler.policy", "sglmoe.launch_server"])
def test_light_modules_stay_light(module: str) -> None:
    """torch costs three seconds and sglang ten, in every process and every unit test."""
    code = f"import sys, {module}; print([m for m in ('torch', 'sglang') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
