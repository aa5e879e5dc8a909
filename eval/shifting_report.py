"""What a workload that shifts has to say: a live budget beside static splits of the same bytes, in each phase.

Tables by budget: throughput, its ratio to the best and the worst static split of that phase, and
what else a split costs. A figure for each system: frames by kind over time, above its throughput.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.memory_timeline import Timeline
from eval.serving_runs import Groups, Row, markdown_table, median, percent, ratio

THROUGHPUT = "total_throughput"  # input and output tokens per second
SMOOTHED_SECONDS = 4.0  # arbitrary: a long prompt counts in one moment

FRAMES = {  # column of the timeline: (legend, colour)
    "expert_frames": ("experts", "#4472a8"),
    "running_kv_frames": ("KV of running requests", "#d9822b"),
    "cached_kv_frames": ("cached KV", "#f3c587"),
    "free_frames": ("free", "#e4e4e4"),
}


class Setting(NamedTuple):
    """Within which systems are compared."""

    budget: str
    concurrency: int
    phase: str


Policies = Mapping[str, Sequence[Row]]  # policy: a row for each round


def by_setting(groups: Groups) -> dict[Setting, dict[str, list[Row]]]:
    """The rounds of every policy; a server that has no such thing goes by its name."""
    settings: dict[Setting, dict[str, list[Row]]] = {}
    for (system, phase, concurrency), rows in groups.items():
        setting = Setting(rows[0]["budget"], concurrency, phase)
        settings.setdefault(setting, {})[rows[0]["policy"] or system] = rows
    return settings


def static_extremes(policies: Policies) -> tuple[str, str] | None:
    """The best and the worst static split by their medians; None if there is no static split."""
    statics = [policy for policy in policies if policy.startswith("static=")]
    if not statics:
        return None

    def throughput(policy: str) -> float:
        return median(policies[policy], THROUGHPUT) or 0.0

    return max(statics, key=throughput), min(statics, key=throughput)


def shifting_sections(groups: Groups, folder: Path) -> list[str]:
    settings = by_setting(groups)
    parts = [
        "A ratio is of each round to the same round of the static split with the best (the worst) median of "
        "that phase, with extremes. A request is rejected when it finds no memory and waits again, and "
        "preempted when it had computed something by then: sums over all rounds.",
        "## Which split wins",
        summary(settings),
    ]
    for budget, concurrency in dict.fromkeys((s.budget, s.concurrency) for s in settings):
        parts += [
            f"## {budget or 'Default'} budget, {concurrency} at a time",
            table({s: p for s, p in settings.items() if s[:2] == (budget, concurrency)}),
        ]
    return [*parts, "## Frames over time", *timelines(settings, folder)]


def summary(settings: Mapping[Setting, Policies]) -> str:
    """A line for each budget and phase: what a static split would have had to know, and the others beside it."""
    others = dict.fromkeys(
        policy
        for policies in settings.values()
        for policy in policies
        if not policy.startswith("static=")
    )
    head = ["budget", "at a time", "phase", "best static", "worst static", "best to worst"]
    for policy in others:
        head += [f"{policy} to best", "to worst"]
    lines = []
    for setting, policies in settings.items():
        if (extremes := static_extremes(policies)) is None:
            continue
        best, worst = (policies[policy] for policy in extremes)
        names = [policy.removeprefix("static=") for policy in extremes]
        line = [setting.budget, str(setting.concurrency), setting.phase, *names]
        line.append(ratio(best, worst, THROUGHPUT))
        for policy in others:
            rows = policies.get(policy)
            line += [ratio(rows, beside, THROUGHPUT) if rows else "" for beside in (best, worst)]
        lines.append(line)
    return markdown_table(head, lines)


def table(settings: Mapping[Setting, Policies]) -> str:
    head = (
        "phase,policy,tokens/s in + out,out,to best static,to worst static,TTFT ms,"
        "prefix hits,expert hits,stalled,rejected,preempted"
    )
    lines = []
    for setting, policies in settings.items():
        extremes = static_extremes(policies)
        for policy, rows in policies.items():
            ratios = [ratio(rows, policies[name], THROUGHPUT) for name in extremes or ()]
            lines.append(
                [
                    setting.phase,
                    policy,
                    f"{median(rows, THROUGHPUT):.1f}",
                    f"{median(rows, 'output_throughput'):.1f}",
                    *(ratios or ["", ""]),
                    f"{median(rows, 'median_ttft_ms'):.0f}",
                    percent(median(rows, "prefix_hit_ratio")),
                    percent(median(rows, "hit_ratio")),
                    percent(median(rows, "stall_share")),
                    total(rows, "rejected_requests"),
                    total(rows, "preempted_requests"),
                ]
            )
    return markdown_table(head.split(","), lines)


def total(rows: Sequence[Row], figure: str) -> str:
    return str(sum(row[figure] for row in rows)) if figure in rows[0] else ""


# ------------------------------------------------------------------------------------------ over time


def timelines(settings: Mapping[Setting, Policies], folder: Path) -> list[str]:
    """A figure for each policy, budget and concurrency, of its first round."""
    runs: dict[tuple[str, int, str], dict[str, Timeline]] = {}
    for (budget, concurrency, phase), policies in settings.items():
        for policy, rows in policies.items():
            if "timeline" in rows[0]:
                runs.setdefault((budget, concurrency, policy), {})[phase] = rows[0]["timeline"]
    images = []
    for (budget, concurrency, policy), phases in runs.items():
        title = f"{policy}, {budget or 'default'} budget, {concurrency} at a time"
        name = re.sub(r"[^\w.]+", "-", f"frames-{budget}-{policy}-x{concurrency}") + ".png"
        plot_timeline(phases, title=title, path=folder / name)
        images.append(f"![Frames by kind over time: {title}]({name})")
    return images


def rates(timeline: Timeline, *columns: str, over_seconds: float = SMOOTHED_SECONDS) -> list[float]:
    """Growth of the sum of these counters, per second, in the time before each sample."""
    seconds = timeline["seconds"]
    counts = [sum(values) for values in zip(*(timeline[name] for name in columns), strict=True)]
    found = []
    first = 0
    for index, now in enumerate(seconds):
        while now - seconds[first] > over_seconds and first < index - 1:
            first += 1
        passed = now - seconds[first]
        found.append((counts[index] - counts[first]) / passed if passed else 0.0)
    return found


def joined(phases: Mapping[str, Timeline]) -> Timeline:
    """The phases of a run, one after the other."""
    parts = list(phases.values())
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def plot_timeline(phases: Mapping[str, Timeline], *, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timeline = joined(phases)
    seconds = timeline["seconds"]
    drawing, (frames, inputs, outputs) = plt.subplots(
        3,
        1,
        figsize=(10, 7),
        dpi=100,
        sharex=True,
        layout="constrained",
        gridspec_kw={"height_ratios": [3, 1, 1]},
    )
    legends, colours = zip(*FRAMES.values(), strict=True)
    frames.stackplot(seconds, *(timeline[name] for name in FRAMES), labels=legends, colors=colours)
    frames.set_ylabel("frames")
    frames.set_ylim(0, sum(timeline[name][0] for name in FRAMES))
    inputs.plot(seconds, rates(timeline, "prefill_tokens", "cache_hit_tokens"), color="#555555")
    inputs.plot(seconds, rates(timeline, "cache_hit_tokens"), color=FRAMES["cached_kv_frames"][1])
    inputs.set_ylabel("input tokens/s")
    inputs.legend(["all", "found cached"], loc="upper center", ncols=2, fontsize=8)
    outputs.plot(seconds, rates(timeline, "decoded_tokens"), color="#555555")
    outputs.set(ylabel="output tokens/s", xlabel="seconds")
    for panel in (inputs, outputs):
        panel.set_ylim(bottom=0)
    for name, part in phases.items():
        start, stop = part["seconds"][0], part["seconds"][-1]
        for panel in (frames, inputs, outputs):
            panel.axvline(start, color="black", linewidth=0.8, linestyle=":")
        frames.text(
            (start + stop) / 2, 1.01, name, transform=frames.get_xaxis_transform(), ha="center"
        )
    frames.set_xlim(seconds[0], seconds[-1])
    drawing.legend(*frames.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    drawing.suptitle(title)
    drawing.savefig(path)
    plt.close(drawing)
