"""`sglmoe.plan` foretells what a server ends up with, and its flags are flags that a server takes."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from checkpoints import FAMILIES, make_checkpoint
from command_lines import refused
from forking import run_in_fork
from recorded_graphs import capture_on_cpu

from sglmoe.checkpoint import read_json
from sglmoe.config import Machine, Options
from sglmoe.decode_graphs import GraphFlags
from sglmoe.demo_model import DEMO_MODEL
from sglmoe.memory.staging import decoding_bytes
from sglmoe.pack import main as pack_experts
from sglmoe.plan.budgets import Demand
from sglmoe.plan.cost_model import assumed_speeds, costs_of
from sglmoe.plan.launch_plan import Question, decode_graphs, plan_launch
from sglmoe.plan.machine_limits import Limits
from sglmoe.plan.model_shape import ModelShape, read_model, shape_of
from sglmoe.plan.packed import stored_bytes_of
from sglmoe.plan.server_flags import ServerFlags
from sglmoe.units import show_bytes

pytestmark = pytest.mark.usefixtures("preloaded")

BUDGET_BYTES = 64 * 10**6  # `LoadedWorker`'s
MAX_RUNNING = 4  # likewise
NO_FLAGS = ServerFlags()
RECIPES = sorted((Path(__file__).parents[2] / "launch").glob("*/*.toml"))


def as_loaded(
    model_dir: Path,
    captured: tuple[int, ...] = (),
    *,
    backend: str = "breakable",
    budget_bytes: int = BUDGET_BYTES,
) -> dict[str, Any]:
    """`captured`: sizes of decode steps out of graphs."""
    from loaded_worker import LoadedWorker

    loaded = LoadedWorker(
        model_dir,
        budget=str(budget_bytes),
        host_memory="8MB" if backend == "full" else None,  # for all experts
        before_loading=(lambda: capture_on_cpu(list(captured), backend)) if captured else None,
    ).loaded
    geometry = loaded.geometry
    return {
        "context_tokens": loaded.context_tokens,
        "dense_bytes": loaded.dense_bytes,
        "graphs": loaded.graphs,
        "floor_frames": loaded.floor_frames,
        "geometry": geometry,
        "total_pages": loaded.memory.snapshot(0).total_pages,
    }


def as_planned(
    shape: ModelShape, flags: ServerFlags = NO_FLAGS, *, budget_bytes: int = BUDGET_BYTES
) -> dict[str, Any]:
    chosen = plan_launch(question(shape, flags, budget_bytes)).chosen
    geometry = chosen.geometry
    assert geometry is not None
    return {
        "context_tokens": shape.context_tokens,
        "dense_bytes": shape.dense_bytes,
        "graphs": decode_graphs(shape, flags),
        "floor_frames": chosen.floor_frames,
        "geometry": geometry,
        "total_pages": chosen.kv_tokens // geometry.page_tokens,
    }


def question(shape: ModelShape, flags: ServerFlags, budget_bytes: int) -> Question:
    """Of this CPU; where steps are captured, of a machine with a GPU, as no other captures."""
    return Question(
        model_path="",
        shape=shape,
        machine=Machine(2**40, 2**40, 2**40, has_gpu=flags.graphs.captures),
        limits=Limits(),
        demand=Demand(),
        costs=costs_of(shape, assumed_speeds("cpu"), request_tokens=1),
        costs_are="",
        options=Options(memory_budget=str(budget_bytes)),
        flags=flags,
    )


@pytest.mark.parametrize("family", ["demo", *FAMILIES])
def test_the_plan_has_the_servers_frames_and_kv_tokens(family: str, tmp_path: Path) -> None:
    """Byte for byte, from the headers; and from the config alone, as for a model that is not here."""
    model_dir = DEMO_MODEL if family == "demo" else run_in_fork(make_checkpoint, family, tmp_path)
    loaded = run_in_fork(as_loaded, model_dir)
    assert as_planned(read_model(str(model_dir), device="cpu").shape) == loaded
    config = read_json(model_dir / "config.json")
    assert as_planned(shape_of(config, dense=None, dtype="auto", device="cpu")) == loaded


@pytest.mark.parametrize(("family", "sizes"), [("qwen3_moe", (1, 2)), ("deepseek_v2", (1, 2, 8))])
def test_the_plan_counts_what_graphs_take(
    family: str, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    """Of steps of no more requests than may run, and padding pages."""
    model_dir = run_in_fork(make_checkpoint, family, tmp_path)
    loaded = run_in_fork(as_loaded, model_dir, sizes)
    assert loaded["graphs"].max_rows == min(sizes[-1], MAX_RUNNING)
    assert loaded["geometry"].padding_pages > 0
    flags = ServerFlags(max_running_requests=MAX_RUNNING, graphs=GraphFlags("breakable", sizes))
    assert as_planned(read_model(str(model_dir), device="cpu").shape, flags) == loaded


def decoding_as_loaded(model_dir: Path) -> int:
    """What a worker on a GPU would set aside, by what it has loaded."""
    from loaded_worker import LoadedWorker

    from sglmoe.worker.model_runner_loading import decoding_bytes_of as of_store

    return of_store(LoadedWorker(model_dir).loaded.experts.store, "cuda")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v2"])
def test_the_plan_counts_what_decoding_packed_experts_takes(family: str, tmp_path: Path) -> None:
    model_dir = run_in_fork(make_checkpoint, family, tmp_path)
    run_in_fork(pack_experts, ["--model-path", str(model_dir)])
    model = read_model(str(model_dir), device="cuda")
    loaded = run_in_fork(decoding_as_loaded, model_dir)
    assert 0 < loaded < 0.8 * 9 * model.shape.expert_bytes
    assert decoding_bytes(stored_bytes_of(model, "auto", "cuda")) == loaded


def start_full_graphs(model_dir: Path, host_bytes: int) -> str:
    """Why a server does not, that has so much host memory; on a CPU."""
    from loaded_worker import LoadedWorker

    def capture() -> None:
        capture_on_cpu([1], "full")

    try:
        LoadedWorker(model_dir, host_memory=str(host_bytes), before_loading=capture)
    except ValueError as error:
        return str(error)
    return ""


def test_steps_without_the_host_need_room_for_all_experts_as_they_are_stored(
    tmp_path: Path,
) -> None:
    """Where the plan says so the server starts, and with less neither."""
    model_dir = run_in_fork(make_checkpoint, "qwen3_moe", tmp_path)
    run_in_fork(pack_experts, ["--model-path", str(model_dir)])
    model = read_model(str(model_dir), device="cuda")
    stored_bytes = stored_bytes_of(model, "auto", "cuda")
    enough = stored_bytes * model.shape.all_experts
    assert enough < 0.8 * model.shape.all_expert_bytes
    flags = ServerFlags(max_running_requests=MAX_RUNNING, graphs=GraphFlags("full", (1,)))
    for host_bytes in (enough, enough - 1):
        asked = question(model.shape, flags, BUDGET_BYTES)
        options = Options(memory_budget=str(BUDGET_BYTES), host_memory=str(host_bytes))
        plan = plan_launch(
            msgspec.structs.replace(asked, options=options, stored_bytes=stored_bytes)
        )
        why = run_in_fork(start_full_graphs, model_dir, host_bytes)
        assert plan.can_start == (host_bytes == enough) == (not why)
        needed = f"to {show_bytes(enough)}, or use breakable"
        assert plan.can_start or (needed in why and needed in str(plan.findings))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_the_plan_has_the_floor_of_steps_without_the_host(family: str, tmp_path: Path) -> None:
    """Where it fits beside KV of a whole context; with a byte less there is the usual one, and KV has more pages."""
    model_dir = run_in_fork(make_checkpoint, family, tmp_path)
    shape = read_model(str(model_dir), device="cpu").shape
    flags = ServerFlags(max_running_requests=MAX_RUNNING, graphs=GraphFlags("full", (1, 2)))
    geometry = as_planned(shape, flags)["geometry"]
    floor_frames = shape.num_moe_layers * shape.top_k
    num_frames = floor_frames + geometry.frames_for(shape.context_tokens)
    beside = shape.dense_bytes + decode_graphs(shape, flags).reserved_bytes + geometry.padding_bytes
    enough = beside + num_frames * geometry.frame_bytes
    for budget, expected in ((enough, floor_frames), (enough - 1, shape.top_k)):
        loaded = run_in_fork(as_loaded, model_dir, (1, 2), backend="full", budget_bytes=budget)
        assert loaded["floor_frames"] == expected
        assert as_planned(shape, flags, budget_bytes=budget) == loaded


def refused_commands() -> dict[str, str]:
    """Of the recipes' commands, those that our parser or our tables of flags refuse, and why."""
    from sglmoe.recipe import read_plan

    commands = {path.name: read_plan(path, [])[0].command for path in RECIPES}
    return {name: why for name, words in commands.items() if (why := refused(words[3:]))}


def test_the_flags_of_every_recipe_are_taken() -> None:
    assert len(RECIPES) == 36
    assert run_in_fork(refused_commands) == {}
