"""From the runs of `eval.serving` to a report: medians, ratios to the first system, plots.

    python -m eval.serving_report eval/results/serving-NAME

Runs of several phases get the report of `eval.shifting_report` instead: ratios to static splits.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from eval.serving_runs import Groups, Row, markdown_table, median, percent, ratio, read_runs
from eval.shifting_report import shifting_sections

PLOTS = {  # figure: (title, unit)
    "output_throughput": ("Output throughput", "tokens/s"),
    "median_ttft_ms": ("Median time to first token", "ms"),
    "median_tpot_ms": ("Median time per output token", "ms"),
    "hit_ratio": ("Expert hits", "% of experts needed"),
    "stall_share": ("Stalled on experts", "% of the run"),
}


def table(groups: Groups) -> str:
    baseline_system = next(iter(groups))[0]
    head = "concurrency,phase,system,tokens/s,ratio,ITL ms,ratio,TTFT ms,ratio,p99 ITL ms,expert hits,stalled"
    lines = []
    for (system, phase, concurrency), rows in groups.items():
        baseline = groups[baseline_system, phase, concurrency]
        lines.append(
            [
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
                hits(rows),
                percent(median(rows, "stall_share")),
            ]
        )
    return markdown_table(head.split(","), lines)


def hits(rows: Sequence[Row]) -> str:
    """Experts needed that were in a frame, and those that were decoded from the arena."""
    packed = median(rows, "packed_ratio")
    decoded = f" + {percent(packed)} packed" if packed else ""
    return percent(median(rows, "hit_ratio")) + decoded


def plot(groups: Groups, figure: str, path: Path) -> bool:
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


def sections(groups: Groups, folder: Path) -> list[str]:
    """Ratios to the first system, and plots over concurrency."""
    images = [
        f"![{PLOTS[figure][0]}]({figure}.png)"
        for figure in PLOTS
        if plot(groups, figure, folder / f"{figure}.png")
    ]
    baseline = next(iter(groups))[0]
    note = f"A ratio is of each round to the same round of {baseline}, with extremes."
    return [note, table(groups), *images]


def write_report(folder: Path) -> Path:
    run, groups = read_runs(folder)
    machine = run["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, no GPU"
    starts = {system: rows[0]["start_seconds"] for (system, _, _), rows in groups.items()}
    ready = ", ".join(f"{seconds} s ({system})" for system, seconds in starts.items())
    rounds = {len(rows) for rows in groups.values()}
    is_shifting = len({phase for _, phase, _ in groups}) > 1
    text = "\n\n".join(
        [
            "# Serving benchmark",
            f"{device}; torch {machine['torch']}; commit {run['commit']}.\n\n    {run['command']}",
            f"Medians of {min(rounds)} rounds. Ready after {ready}.",
            *(shifting_sections if is_shifting else sections)(groups, folder),
        ]
    )
    path = folder / "report.md"
    path.write_text(text + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    print(write_report(parser.parse_args().folder))


if __name__ == "__main__":
    main()
