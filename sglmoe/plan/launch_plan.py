"""From a model and a machine to flags: which budget, what it will bring, what stands in the way, and the command. Pure."""

from collections.abc import Iterator

import msgspec

from sglmoe.config import DEFAULT_MAX_RUNNING, Machine, MemoryPolicy, Options, plan_config
from sglmoe.decode_graphs import DecodeGraphs, captured_rows, check_graphs, graph_bytes
from sglmoe.errors.budgets import (
    full_graphs_may_lack_frames,
    full_graphs_need_all_experts,
)
from sglmoe.memory.arena import least_lent
from sglmoe.plan.budgets import (
    BudgetPlan,
    Demand,
    PlanSnapshot,
    budgets_to_try,
    plan_budget,
)
from sglmoe.plan.cost_model import CostModel
from sglmoe.plan.machine_limits import (
    HEADROOM_BYTES,
    Finding,
    Limits,
    Severity,
    find_problems,
    problem,
    warning,
)
from sglmoe.plan.model_shape import ModelShape
from sglmoe.plan.server_flags import ServerFlags
from sglmoe.units import parse_bytes

PROGRAM = "python -m sglmoe.launch_server"


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked: may this model run on that machine, with these flags where some are given?"""

    model_path: str
    shape: ModelShape
    machine: Machine
    limits: Limits
    demand: Demand
    costs: CostModel
    costs_are: str  # where they come from, in words
    stored_bytes: int = 0  # of the largest expert, where a GPU decodes packed ones
    options: Options = Options()
    memory_policy: MemoryPolicy = MemoryPolicy.COST_AWARE
    budgets: tuple[int, ...] = ()  # to compare; those of `budgets_to_try` if none
    flags: ServerFlags = ServerFlags()
    arguments: tuple[str, ...] = ()  # of the command, beside those of `options`


class LaunchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    model_path: str
    shape: ModelShape
    machine: Machine
    demand: Demand
    costs: CostModel
    costs_are: str
    decoding_bytes: int
    graphs: DecodeGraphs
    chosen: BudgetPlan
    compared: tuple[BudgetPlan, ...]
    findings: tuple[Finding, ...]
    command: tuple[str, ...]

    @property
    def can_start(self) -> bool:
        return all(finding.severity is not Severity.PROBLEM for finding in self.findings)


def plan_launch(asked: Question) -> LaunchPlan:
    """Fill in the server's own defaults where no flag is given. Raises ValueError for what the machine has not got."""
    check_graphs(asked.flags.graphs, on_gpu=asked.machine.has_gpu)
    if asked.stored_bytes:
        costs = asked.costs.moving(asked.stored_bytes / asked.shape.expert_bytes)
        asked = msgspec.structs.replace(asked, costs=costs)
    options = fill_in(asked)
    config = plan_config(options, asked.machine, page_tokens=asked.flags.page_size)
    now = snapshot_of(asked, config.memory_budget_bytes, config.host_memory_bytes)
    chosen = plan_budget(now, config.memory_budget_bytes, config.host_memory_bytes)
    budgets = asked.budgets or budgets_to_try(now)
    return LaunchPlan(
        model_path=asked.model_path,
        shape=asked.shape,
        machine=asked.machine,
        demand=asked.demand,
        costs=asked.costs,
        costs_are=asked.costs_are,
        decoding_bytes=now.decoding_bytes,
        graphs=now.graphs,
        chosen=chosen,
        compared=tuple(
            plan_budget(
                snapshot_of(asked, budget, config.host_memory_bytes),
                budget,
                config.host_memory_bytes,
            )
            for budget in sorted(budgets)
        ),
        findings=(
            *find_problems(asked.shape, chosen, asked.machine, asked.limits),
            *find_graph_problems(asked, now, chosen),
        ),
        command=launch_command(asked, options),
    )


def fill_in(asked: Question) -> Options:
    """The flags of the command: what was given, and the server's defaults, written so that they can be read."""
    options = asked.options
    config = plan_config(options, asked.machine, page_tokens=asked.flags.page_size)
    host = options.host_memory
    if host is None and config.host_memory_bytes and asked.shape.num_experts:
        block_bytes = asked.stored_bytes or asked.shape.expert_bytes
        host = host_flag(config.host_memory_bytes, asked.shape.all_experts * block_bytes)
    return msgspec.structs.replace(
        options,
        memory_budget=options.memory_budget or size_flag(config.memory_budget_bytes),
        host_memory=host,
    )


def snapshot_of(asked: Question, budget_bytes: int, host_bytes: int) -> PlanSnapshot:
    """On a CPU whatever memory is left keeps pages of the checkpoint."""
    taken = budget_bytes + host_bytes + HEADROOM_BYTES
    left = 0 if asked.machine.has_gpu else max(0, asked.machine.host_bytes - taken)
    graphs = decode_graphs(asked.shape, asked.flags)
    context_tokens = asked.flags.context_length or asked.shape.context_tokens
    return PlanSnapshot(
        shape=asked.shape,
        costs=asked.costs,
        demand=asked.demand,
        page_cache_bytes=left,
        page_tokens=asked.flags.page_size,
        max_running=asked.flags.max_running_requests or DEFAULT_MAX_RUNNING,
        graphs=graphs,
        stored_bytes=asked.stored_bytes,
        context_tokens=graphs.lent_beside(context_tokens, asked.memory_policy),
        on_gpu=asked.machine.has_gpu,
    )


def decode_graphs(shape: ModelShape, flags: ServerFlags) -> DecodeGraphs:
    """What the server will capture, and set aside for that."""
    max_rows = captured_rows(flags.graphs, flags.max_running_requests)
    context_tokens = flags.context_length or shape.context_tokens
    reserved_bytes = graph_bytes(
        max_rows, context_tokens=context_tokens, vocab_size=shape.vocab_size
    )
    return DecodeGraphs(max_rows, reserved_bytes, flags.graphs.backend == "full")


def find_graph_problems(
    asked: Question, now: PlanSnapshot, chosen: BudgetPlan
) -> Iterator[Finding]:
    """Steps that run without the host read experts from host memory alone, and need frames for all that they use at once."""
    shape, geometry = asked.shape, chosen.geometry
    all_block_bytes = shape.all_experts * now.block_bytes
    if now.graphs.is_full and chosen.host_bytes < all_block_bytes:
        yield problem(
            full_graphs_need_all_experts(host_bytes=chosen.host_bytes, expert_bytes=all_block_bytes)
        )
    if now.context_tokens is None or geometry is None or not shape.num_experts:
        return
    num_frames = least_lent(shape.num_moe_layers, shape.num_experts, shape.top_k)
    missing = num_frames + geometry.frames_for(now.context_tokens) - geometry.num_frames
    if missing > 0:
        yield warning(
            full_graphs_may_lack_frames(
                num_frames=num_frames,
                context_tokens=now.context_tokens,
                missing_bytes=missing * geometry.frame_bytes,
            )
        )


def launch_command(asked: Question, options: Options) -> tuple[str, ...]:
    flags = [*PROGRAM.split(), "--model-path", asked.model_path]
    if options.memory_budget:
        flags += ["--memory-budget", options.memory_budget]
    if options.host_memory:
        flags += ["--host-memory", options.host_memory]
    return (*flags, *asked.arguments)


def host_flag(host_bytes: int, all_expert_bytes: int) -> str:
    """So much host memory, and no more than all experts take there; but these wholly, where they fit."""
    if host_bytes < all_expert_bytes:
        return size_flag(host_bytes)
    unit = 2**30 if all_expert_bytes >= 2**30 else 2**20
    for size_bytes in (all_expert_bytes, all_expert_bytes + unit // 100 + 1):
        text = size_flag(size_bytes)
        if all_expert_bytes <= parse_bytes(text, whole_bytes=0) <= host_bytes:
            return text
    return str(all_expert_bytes)


def size_flag(size_bytes: int) -> str:
    """The size, rounded down to a hundredth of its unit, as --memory-budget reads it."""
    unit, name = (2**30, "GiB") if size_bytes >= 2**30 else (2**20, "MiB")
    text = f"{size_bytes * 100 // unit / 100:.2f}{name}"
    return (
        text if size_bytes * 100 >= unit and parse_bytes(text, whole_bytes=0) else str(size_bytes)
    )
