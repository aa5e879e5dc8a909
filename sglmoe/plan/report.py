"""A plan in words, a table and a plot."""

import shlex
from pathlib import Path

from sglmoe.config import Machine
from sglmoe.plan.budgets import BudgetPlan, DecodeForecast
from sglmoe.plan.launch_plan import LaunchPlan
from sglmoe.plan.model_shape import ModelShape
from sglmoe.units import show_bytes

MARKS = "*: the command's budget; !: more than is free on the device; xN: at N requests at a time"


def full_report(plan: LaunchPlan) -> str:
    """What `python -m sglmoe.plan` prints: markdown."""
    parts = [
        model_line(plan),
        machine_line(plan.machine),
        *beside_lines(plan),
        "",
        budget_table(plan),
        "",
        MARKS,
        f"Assumed: {assumptions(plan)}",
        *(str(finding) for finding in plan.findings),
        "",
        f"    {shlex.join(plan.command)}",
    ]
    return "\n".join(parts)


def short_report(plan: LaunchPlan) -> str:
    """What the server prints when it starts."""
    lines = [model_line(plan), *beside_lines(plan), budget_line(plan.chosen, plan.shape)]
    if plan.chosen.forecasts and plan.shape.num_experts:
        hits = ", ".join(f"{f.hit_ratio:.0%} x{f.concurrency}" for f in plan.chosen.forecasts)
        lines.append(
            f"expected hits at so many requests: {hits} ({routing_words(plan)}); speeds: python -m sglmoe.plan"
        )
    return "\n".join([*lines, *(str(finding) for finding in plan.findings)])


def model_line(plan: LaunchPlan) -> str:
    shape = plan.shape
    if not shape.num_experts:
        return f"{plan.model_path}: {show_bytes(shape.dense_bytes)}, no routed experts"
    return (
        f"{plan.model_path}: dense {show_bytes(shape.dense_bytes)}, {shape.all_experts} experts of "
        f"{show_bytes(shape.expert_bytes)} ({show_bytes(shape.all_expert_bytes)}), a token's KV "
        f"{show_bytes(shape.token_bytes)}"
    )


def machine_line(machine: Machine) -> str:
    if not machine.has_gpu:
        return f"Machine: {show_bytes(machine.host_bytes)} of memory, no GPU"
    return (
        f"Machine: GPU of {show_bytes(machine.device_bytes)} ({show_bytes(machine.free_device_bytes)} free), "
        f"{show_bytes(machine.host_bytes)} of host memory"
    )


def beside_lines(plan: LaunchPlan) -> list[str]:
    """What takes of a budget before frames do, and not in every server."""
    graphs, lines = plan.graphs, []
    if plan.decoding_bytes:
        lines.append(f"Decoding packed experts: {show_bytes(plan.decoding_bytes)} of a budget")
    if graphs.max_rows:
        lines.append(
            f"CUDA graphs of decode steps of up to {graphs.max_rows} requests: {show_bytes(graphs.reserved_bytes)} of a "
            "budget, by a rule of thumb"
        )
    return lines


def budget_line(budget: BudgetPlan, shape: ModelShape) -> str:
    if budget.geometry is None:
        return budget.refusal
    geometry = budget.geometry
    return (
        f"--memory-budget {show_bytes(budget.budget_bytes)}: {geometry.num_frames} frames of "
        f"{show_bytes(geometry.frame_bytes)} for {shape.all_experts} experts and KV, at most "
        f"{budget.kv_tokens} tokens of it; --host-memory {show_bytes(budget.host_bytes)}"
    )


def budget_table(plan: LaunchPlan) -> str:
    """All budgets in ascending order; `*` marks the command's, `!` what the device has no room for."""
    clients = plan.demand.concurrency
    heads = [f"hits x{n}" for n in clients] + [f"tokens/s x{n}" for n in clients]
    lines = [
        "| budget | dense | experts resident | frames | KV tokens at most | "
        + " | ".join(heads)
        + " |",
        "|" + "---|" * (5 + len(heads)),
    ]
    rows = sorted({*plan.compared, plan.chosen}, key=lambda row: row.budget_bytes)
    return "\n".join([*lines, *(_row(plan, row) for row in rows)])


def _row(plan: LaunchPlan, row: BudgetPlan) -> str:
    mark = " *" if row.budget_bytes == plan.chosen.budget_bytes else ""
    mark += " !" if row.budget_bytes > plan.machine.free_device_bytes else ""
    budget = f"| {show_bytes(row.budget_bytes)}{mark} | {show_bytes(plan.shape.dense_bytes)} "
    if row.geometry is None:
        return f"{budget}| {row.refusal} |"
    hits = [f"{its.hit_ratio:.0%}{_fewer(its)}" for its in row.forecasts]
    speeds = [_digits(its.tokens_per_second) for its in row.forecasts]
    return (
        f"{budget}| {row.resident_ratio:.0%} | {row.geometry.num_frames} | {row.kv_tokens} | "
        + " | ".join([*hits, *speeds])
        + " |"
    )


def _fewer(forecast: DecodeForecast) -> str:
    fewer = forecast.num_running < forecast.concurrency
    return f" ({forecast.num_running} run)" if fewer else ""


def _digits(number: float) -> str:
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"


def assumptions(plan: LaunchPlan) -> str:
    return (
        f"requests of {plan.demand.request_tokens} tokens, decoding, nothing cached, no prefetching; "
        f"{routing_words(plan)}; {plan.costs_are}"
    )


def routing_words(plan: LaunchPlan) -> str:
    if plan.demand.skew is not None:
        return f"routing of skew {plan.demand.skew:g}"
    skews = ", ".join(f"{plan.demand.skew_at(n):.1f} x{n}" for n in plan.demand.concurrency)
    return f"routing as uneven as in the demo model's reference traces (skew {skews})"


def draw(plan: LaunchPlan, path: Path) -> None:
    """Hits and tokens per second over the budget, a line for each number of requests."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in sorted({*plan.compared, plan.chosen}, key=_size) if row.forecasts]
    figure, (hits, speeds) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    budgets = [row.budget_bytes / 2**30 for row in rows]
    for index, clients in enumerate(plan.demand.concurrency):
        forecasts = [row.forecasts[index] for row in rows]
        hits.plot(budgets, [its.hit_ratio for its in forecasts], marker="o", label=f"x{clients}")
        speeds.plot(budgets, [its.tokens_per_second for its in forecasts], marker="o")
    hits.set(ylabel="hit ratio", ylim=(0, 1.02))
    speeds.set(ylabel="tokens/s", ylim=(0, None))
    for axes in (hits, speeds):
        axes.axvline(plan.chosen.budget_bytes / 2**30, color="0.7", linestyle=":")
        axes.set_xlabel("--memory-budget (GiB)")
    hits.legend(title="requests", frameon=False)
    figure.suptitle(f"{plan.model_path}: predicted, not measured", fontsize=10)
    figure.savefig(path, dpi=120)


def _size(row: BudgetPlan) -> int:
    return row.budget_bytes
