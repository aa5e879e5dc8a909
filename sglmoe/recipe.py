"""A recipe is a model on a machine, in a file of a few lines that can be run: launch/24gb/mixtral-8x7b.toml.

    launch/24gb/mixtral-8x7b.toml --dry-run
    python -m sglmoe.recipe launch/24gb/mixtral-8x7b.toml [--dry-run] [more flags of the server's]

Prints what the server will use and what to expect, checks this machine, and becomes the server. It does not
where a check says that it would not start. With `--dry-run` it prints and checks only: then it fails where the
recipe would not do on the machine that it is for, and what this machine lacks is said, not judged.
"""

import os
import sys
import tomllib
from pathlib import Path

import msgspec

from sglmoe.config import Machine, Options
from sglmoe.errors.options import bad_recipe, recipe_not_started, unknown_machine
from sglmoe.machine import has_accelerator, measure_machine
from sglmoe.plan.budgets import Demand
from sglmoe.plan.cost_model import Speeds, costs_of
from sglmoe.plan.launch_plan import LaunchPlan, Question, plan_launch
from sglmoe.plan.machine_limits import Limits, find_problems, measure_limits
from sglmoe.plan.model_shape import Model, find_folder, read_model
from sglmoe.plan.packed import stored_bytes_of
from sglmoe.plan.report import full_report
from sglmoe.plan.server_flags import find_server_flags
from sglmoe.units import parse_bytes

PROGRAM = "python -m sglmoe.recipe"
LAYER_SECONDS = {"cuda": 0.5e-3, "cpu": 1e-3}


class MachineText(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The machine that a recipe is for, as its file has it."""

    name: str
    device: str
    gpu_memory: str | None = None  # that a process finds free
    host_memory: str
    device_bandwidth: str  # the GPU's memory or, without a GPU, RAM; from its data sheet
    link: str  # host memory to the device
    disk: str = "2GB/s"

    def machine(self) -> Machine:
        host = _bytes(self.host_memory)
        device = _bytes(self.gpu_memory) if self.gpu_memory else host
        return Machine(device, device, host, has_gpu=self.device != "cpu")

    def speeds(self) -> Speeds:
        return Speeds(
            memory_bytes_per_second=_bytes(self.device_bandwidth),
            link_bytes_per_second=_bytes(self.link),
            disk_bytes_per_second=_bytes(self.disk),
            layer_seconds=LAYER_SECONDS[self.device],
        )


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a recipe's file says."""

    model: str  # a repository
    shape: str  # its config, a file beside the recipe: a plan downloads nothing
    machine: str  # one of machines.toml
    flags: dict[str, str | int] = {}  # of the server's


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    more = [text for text in given[1:] if text != "--dry-run"]
    if not given or given[0].startswith("-"):
        sys.exit(__doc__)
    try:
        plan, notes = read_plan(Path(given[0]), more)
    except (ValueError, OSError) as error:
        sys.exit(f"{PROGRAM}: {bad_recipe(path=Path(given[0]), why=str(error))}")
    print(full_report(plan))
    print(
        "\n".join(f"this machine: {note}" for note in notes) or "this machine: nothing in the way"
    )
    if "--dry-run" in given:
        return 0 if plan.can_start else 1
    if not plan.can_start or any(note.startswith("problem") for note in notes):
        sys.exit(f"{PROGRAM}: {recipe_not_started()}")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *plan.command[1:]])


def read_recipe(path: Path) -> tuple[Recipe, MachineText]:
    """Raises ValueError for a file that is none."""
    recipe = msgspec.convert(tomllib.loads(path.read_text()), Recipe)
    machines = tomllib.loads((path.parent / "../machines.toml").read_text())
    if recipe.machine not in machines:
        raise unknown_machine(given=recipe.machine, known=list(machines))
    return recipe, msgspec.convert(machines[recipe.machine], MachineText)


def read_plan(path: Path, more: list[str]) -> tuple[LaunchPlan, list[str]]:
    """The plan on the recipe's machine, and what stands in its way on this one. Raises ValueError."""
    recipe, text = read_recipe(path)
    ours = {name: str(value) for name, value in recipe.flags.items()}
    options = Options(
        memory_budget=ours.pop("memory-budget", None), host_memory=ours.pop("host-memory", None)
    )
    arguments = (*(part for flag in ours.items() for part in as_arguments(*flag)), *more)
    flags = find_server_flags(arguments)
    model = read_shape(recipe, path, dtype=flags.dtype, device=text.device)
    question = Question(
        model_path=recipe.model,
        shape=model.shape,
        machine=text.machine(),
        limits=Limits(),
        demand=Demand(),
        costs=costs_of(model.shape, text.speeds(), request_tokens=Demand().request_tokens),
        costs_are=f"{text.name}, by its data sheet; {never_run(text)}",
        stored_bytes=stored_bytes_of(model, flags.packed_experts, text.device),
        options=options,
        flags=flags,
        arguments=arguments,
    )
    plan = plan_launch(question)
    return plan, check_here(model, plan, text)


def read_shape(recipe: Recipe, path: Path, *, dtype: str, device: str) -> Model:
    """From the checkpoint's headers where it is here, or else from the recipe's own copy of its config."""
    here = find_folder(recipe.model)
    config_file = None if here else path.parent / recipe.shape
    return read_model(recipe.model, dtype=dtype, device=device, config_file=config_file)


def never_run(text: MachineText) -> str:
    return "nobody has run this recipe" if text.device == "cpu" else "no GPU has run this recipe"


def as_arguments(name: str, value: str) -> tuple[str, ...]:
    return (f"--{name}",) if value == "" else (f"--{name}", value)


def check_here(model: Model, plan: LaunchPlan, text: MachineText) -> list[str]:
    if text.device != "cpu" and not has_accelerator():
        return ["problem: there is no GPU"]
    machine = measure_machine(device=text.device, gpu_id=0)
    notes = [str(it) for it in find_problems(model.shape, plan.chosen, machine, measure_limits())]
    if model.folder is None:
        notes.append(
            f"note: {model.name} is not in Hugging Face's cache; the server will download "
            f"{(model.shape.dense_bytes + model.shape.all_expert_bytes) / 1e9:.0f} GB"
        )
    return notes


def _bytes(text: str) -> int:
    return parse_bytes(text.removesuffix("/s"), whole_bytes=0)


if __name__ == "__main__":
    sys.exit(main())
