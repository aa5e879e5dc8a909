"""From the runs of `eval.serving` to a report: medians, ratios to the first system, plots.

python -m eval.serving_report eval/results/serving-NAME
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Group = dict[tuple[str, str, int], list[Row]]  # system, phase, concurrency

PLOTS = {  # figure: (title, unit)
    "output_throughput": ("Output throughput", "tokens/s"),
    "median_ttft_ms": ("Median time to first token", "ms"),
    "median_tpot_ms": ("Median time per output token", "ms"),
    "hit_ratio": ("Expert hits", "% of experts needed"),
    "stall_share": ("Stalled on experts", "% of the run"),
}


def read_runs(folder: Path) -> tuple[dict[str, Any], Group]:
    """What was run where, and the runs by what they measured, in the order of the file."""
    first, *lines = (folder / "runs.jsonl").read_text().splitlines()
    groups: Group = {}
    for line in lines:
        row = json.loads(line)
        if "expert_hits" in row:
            needed = row["expert_hits"] + row["expert_misses"]
            row["hit_ratio"] = 100 * row["expert_hits"] / needed if needed else 100.0
            row["stall_share"] = 100 * row["stall_seconds"] / row["duration"]
        groups.setdefault((row["system"], row["phase"], row["concurrency"]), []).append(row)
    return json.loads(first), groups


def median(rows: list[Row], figure: str) -> float | None:
    return statistics.median(row[figure] for row in rows) if figure in rows[0] else None


def ratio(rows: list[Row], baseline: list[Row], figure: str) -> str:
    """Median and extremes of the rounds' ratios: each round beside its own baseline."""
    values = [a[figure] / b[figure] for a, b in zip(rows, baseline, strict=True)]
    return f"{statistics.median(values):.2f} [{min(values):.2f} .. {max(values):.2f}]"


def table(groups: Group) -> str:
    baseline_system = next(iter(groups))[0]
    lines = [
        "| concurrency | phase | system | tokens/s | ratio | ITL ms | ratio | TTFT ms | ratio "
        "| p99 ITL ms | expert hits | stalled |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (system, phase, concurrency), rows in groups.items():
        baseline = groups[baseline_system, phase, concurrency]
        cells = [
            f"{concurrency}",
            phase,
            system,
            f"{median(rows, 'output_throughput'):.1f}",
            ratio(rows, baseline, "output_throughput"),
            f"{median(rows, 'median_itl_ms'):.1f}",
            ratio(rows, baseline, "median_itl_ms"),
            f"{median(rows, 'median_ttft_ms'):.1f}",
            ratio(rows, baseline, "median_ttft_ms"),
            f"{median(rows, 'p99_itl_ms'):.1f}",
            percent(median(rows, "hit_ratio")),
            percent(median(rows, "stall_share")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


def plot(groups: Group, figure: str, path: Path) -> bool:
    """One figure over concurrency, a line for each system; False if no system has it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    phases = list(dict.fromkeys(phase for _, phase, _ in groups))
    drawing, panels = plt.subplots(
        1,
        len(phases),
        figsize=(5.5 * len(phases), 3.6),
        layout="constrained",
        squeeze=False,
        dpi=110,
    )
    title, unit = PLOTS[figure]
    drawn = False
    for panel, phase in zip(panels[0], phases, strict=True):
        for system in dict.fromkeys(system for system, _, _ in groups):
            points = [
                (concurrency, median(rows, figure))
                for (name, its, concurrency), rows in groups.items()
                if (name, its) == (system, phase) and figure in rows[0]
            ]
            if points:
                drawn = True
                panel.plot(*zip(*points, strict=True), marker="o", label=system)
        panel.set(
            xlabel="concurrent requests", ylabel=unit, title=f"{title}: {phase}", xscale="log"
        )
        ticks = sorted({concurrency for _, _, concurrency in groups})
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.legend()
    if drawn:
        drawing.savefig(path)
    plt.close(drawing)
    return drawn


def write_report(folder: Path) -> Path:
    run, groups = read_runs(folder)
    images = [
        f"![{PLOTS[figure][0]}]({figure}.png)"
        for figure in PLOTS
        if plot(groups, figure, folder / f"{figure}.png")
    ]
    machine = run["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, no GPU"
    baseline = next(iter(groups))[0]
    starts = {system: rows[0]["start_seconds"] for (system, _, _), rows in groups.items()}
    ready = ", ".join(f"{seconds} s ({system})" for system, seconds in starts.items())
    rounds = {len(rows) for rows in groups.values()}
    text = "\n\n".join(
        [
            "# Serving benchmark",
            f"{device}; torch {machine['torch']}; commit {run['commit']}.\n\n    {run['command']}",
            f"Medians of {min(rounds)} rounds. A ratio is of each round to the same round of {baseline}, with extremes.",
            f"Ready after {ready}.",
            table(groups),
            *images,
        ]
    )
    path = folder / "report.md"
    path.write_text(text + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    print(write_report(parser.parse_args().folder))


if __name__ == "__main__":
    main()
