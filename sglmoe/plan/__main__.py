"""Does the model fit, how fast will it be, and with which flags? Before anything is loaded.

    python -m sglmoe.plan --model-path MODEL
    python -m sglmoe.plan --model-path MODEL --gpu-memory 24GiB --host-memory 64GiB --link 25GB/s

Reads config.json and the headers of the safetensors files, of a folder here or of Hugging Face's cache.
The first form is for this machine, whose speed is measured in a few seconds; the second for another one.
Exits with 1 where a server would not start.
"""

import argparse
import sys
from pathlib import Path

import msgspec

from sglmoe.config import Machine, Options
from sglmoe.demo_model import DEMO_MODEL
from sglmoe.errors.options import half_a_machine, no_matplotlib, not_a_size
from sglmoe.machine import has_accelerator, measure_machine
from sglmoe.plan.budgets import Demand
from sglmoe.plan.cost_model import CostModel, Speeds, assumed_speeds, costs_of
from sglmoe.plan.launch_plan import Question, plan_launch
from sglmoe.plan.machine_limits import Limits, measure_limits
from sglmoe.plan.model_shape import Model, read_model
from sglmoe.plan.packed import stored_bytes_of
from sglmoe.plan.report import draw, full_report
from sglmoe.plan.server_flags import add_server_flags, as_arguments, server_flags
from sglmoe.units import parse_bytes

PROGRAM = "python -m sglmoe.plan"


def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    try:
        question = ask(options)
        plan = plan_launch(question)
    except ValueError as error:
        sys.exit(f"{PROGRAM}: {error}")
    if options.plot is not None:
        try:
            draw(plan, options.plot)
        except ImportError:
            sys.exit(f"{PROGRAM}: {no_matplotlib()}")
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(plan)).decode())
    else:
        print(full_report(plan))
    return 0 if plan.can_start else 1


def ask(options: argparse.Namespace) -> Question:
    """Look at the model and the machine. Raises ValueError."""
    device = options.device or ("cuda" if options.gpu_memory or has_accelerator() else "cpu")
    model = read_model(
        options.model_path, dtype=options.dtype, device=device, config_file=options.config_file
    )
    is_here = not options.gpu_memory and not options.host_memory
    machine = measure_machine(device=device, gpu_id=0) if is_here else described(options, device)
    costs, costs_are = costs_for(
        model, options, device, measure=is_here and not options.no_measuring
    )
    flags = server_flags(options)
    return Question(
        model_path=options.model_path,
        shape=model.shape,
        machine=machine,
        limits=measure_limits() if is_here else Limits(),
        demand=demand_of(options),
        costs=costs,
        costs_are=costs_are,
        stored_bytes=stored_bytes_of(model, flags.packed_experts, device),
        options=Options(memory_budget=options.memory_budget, host_memory=options.expert_memory),
        budgets=tuple(
            parse_bytes(text, whole_bytes=machine.device_bytes)
            for text in filter(None, options.budgets.split(","))
        ),
        flags=flags,
        arguments=tuple(as_arguments(flags)),
    )


def demand_of(options: argparse.Namespace) -> Demand:
    return Demand(
        concurrency=tuple(sorted(map(int, options.concurrency.split(",")))),
        request_tokens=options.request_tokens,
        skew=options.skew,
    )


def described(options: argparse.Namespace, device: str) -> Machine:
    """The machine of the flags. Without one for host memory it is this one's."""
    here = measure_machine(device="cpu", gpu_id=0)
    host = _size("--host-memory", options.host_memory) or here.host_bytes
    if device == "cpu":
        return Machine(host, host, host, has_gpu=False)
    if not options.gpu_memory:
        raise half_a_machine()
    gpu = _size("--gpu-memory", options.gpu_memory)
    return Machine(gpu, gpu, host, has_gpu=True)


def costs_for(
    model: Model, options: argparse.Namespace, device: str, *, measure: bool
) -> tuple[CostModel, str]:
    """And where they come from, in words."""
    if measure and not (options.link or options.device_bandwidth):
        from sglmoe.plan.measure import measure_costs

        costs = measure_costs(model, device=device, request_tokens=options.request_tokens)
        return costs, "speeds measured on this machine"
    assumed = assumed_speeds(device)
    speeds = Speeds(
        memory_bytes_per_second=_rate("--device-bandwidth", options.device_bandwidth)
        or assumed.memory_bytes_per_second,
        link_bytes_per_second=_rate("--link", options.link) or assumed.link_bytes_per_second,
        disk_bytes_per_second=_rate("--disk", options.disk) or assumed.disk_bytes_per_second,
        layer_seconds=assumed.layer_seconds,
    )
    costs = costs_of(model.shape, speeds, request_tokens=options.request_tokens)
    return costs, speeds_in_words(speeds)


def speeds_in_words(speeds: Speeds) -> str:
    return (
        f"nothing measured: the device reads {speeds.memory_bytes_per_second / 1e9:g} GB/s, host memory comes at "
        f"{speeds.link_bytes_per_second / 1e9:g} GB/s, disk at {speeds.disk_bytes_per_second / 1e9:g} GB/s, "
        f"a layer takes {1000 * speeds.layer_seconds:g} ms beside that"
    )


def _size(flag: str, text: str | None) -> int:
    """0 where nothing was given."""
    try:
        return parse_bytes(text, whole_bytes=0) if text else 0
    except ValueError as error:
        raise not_a_size(flag=flag, why=str(error)) from None


def _rate(flag: str, text: str | None) -> int:
    return _size(flag, text.removesuffix("/s") if text else None)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default=str(DEMO_MODEL), help="default: the demo model")
    parser.add_argument("--config-file", type=Path, help="config.json of a model that is not here")
    parser.add_argument("--memory-budget", metavar="SIZE", help="default: the server's")
    parser.add_argument(
        "--expert-memory", metavar="SIZE", help="the server's --host-memory; default: the server's"
    )
    parser.add_argument("--budgets", default="", help="to compare, with commas: 12GiB,16GiB,20GiB")
    add_server_flags(parser)
    machine = parser.add_argument_group("another machine than this one")
    machine.add_argument("--gpu-memory", metavar="SIZE")
    machine.add_argument("--host-memory", metavar="SIZE", help="all that there is beside the GPU")
    machine.add_argument("--device", choices=("cpu", "cuda"))
    machine.add_argument("--link", metavar="RATE", help="host memory to GPU: 25GB/s")
    machine.add_argument("--device-bandwidth", metavar="RATE", help="the GPU's memory: 1008GB/s")
    machine.add_argument("--disk", metavar="RATE", help="the checkpoint's: 2GB/s")
    machine.add_argument("--no-measuring", action="store_true", help="assume speeds here as well")
    load = parser.add_argument_group("what it has to do")
    load.add_argument("--concurrency", default="1,8,32", help="requests at a time")
    load.add_argument("--request-tokens", type=int, default=1024, help="KV of one, on average")
    load.add_argument(
        "--skew",
        type=float,
        help="of routing: the least used expert is used exp(-SKEW) times as often as the most used; default: the "
        "reference traces'",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
