"""Figures of prefetch replays: tables and a plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec


class Outcome(msgspec.Struct, frozen=True):
    """One policy with one predictor on one trace."""

    policy: str
    num_frames: int
    bytes_per_second: float
    hits: int  # resident when their layer began
    misses: int
    seconds: float
    compute_seconds: float
    busy_seconds: float  # of the link
    bytes_moved: int
    predictor: str | None = None
    prefetches_begun: int = 0
    prefetches_used: int = 0
    prefetches_late: int = 0  # on their way when their layer began
    prefetches_wasted: int = 0
    mean_horizon: float = 0.0

    @property
    def hit_ratio(self) -> float:
        return self.hits / (self.hits + self.misses)

    @property
    def stall_seconds(self) -> float:
        return self.seconds - self.compute_seconds

    @property
    def stall_ratio(self) -> float:
        """Of all time."""
        return self.stall_seconds / self.seconds

    @property
    def idle_ratio(self) -> float:
        """Of the link."""
        return 1 - self.busy_seconds / self.seconds

    @property
    def name(self) -> str:
        return self.policy if self.predictor is None else f"{self.policy}, {self.predictor}"

    def figures(self) -> dict[str, Any]:
        derived = ("hit_ratio", "stall_ratio", "idle_ratio")
        values = msgspec.structs.asdict(self) | {name: getattr(self, name) for name in derived}
        return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}


COLUMNS = (
    "link",
    "frames",
    "policy, predictor",
    "hit ratio",
    "stalled",
    "of LRU's stalls",
    "MiB moved",
    "prefetched",
    "used",
    "late",
    "wasted",
    "link idle",
    "horizon",
)


def table(outcomes: Sequence[Outcome]) -> str:
    """Of one trace. Stalled: of all time; and beside LRU's seconds in the same frames and link."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for its in outcomes:
        share = stall_share(its, outcomes)
        row = (
            f"{its.bytes_per_second / 1e9:g} GB/s",
            its.num_frames,
            its.name,
            f"{its.hit_ratio:.1%}",
            f"{its.stall_ratio:.1%}",
            "-" if share is None else f"{share:.1%}",
            f"{its.bytes_moved / 2**20:.1f}",
            its.prefetches_begun,
            its.prefetches_used,
            its.prefetches_late,
            its.prefetches_wasted,
            f"{its.idle_ratio:.1%}",
            f"{its.mean_horizon:.2f}",
        )
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def stall_share(outcome: Outcome, outcomes: Sequence[Outcome]) -> float | None:
    """Its stalls over those of LRU without prefetching, where that was replayed and stalled."""
    for its in outcomes:
        if its.policy == "lru" and _place(its) == _place(outcome) and its.stall_seconds > 0:
            return outcome.stall_seconds / its.stall_seconds
    return None


def _place(outcome: Outcome) -> tuple[int, float]:
    return outcome.num_frames, outcome.bytes_per_second


def save(traces: Mapping[str, Sequence[Outcome]], run: Mapping[str, Any], path: Path) -> None:
    """As JSON, a line for each outcome."""
    blocks = []
    for name, found in traces.items():
        lines = ",\n".join(json.dumps(its.figures()) for its in found)
        blocks.append(f"{json.dumps(name)}: [\n{lines}\n]")
    traces_text = ",\n".join(blocks)
    path.write_text(f'{{"run": {json.dumps(run)},\n"traces": {{\n{traces_text}\n}}}}\n')


def plot(traces: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    """Share of time stalled over frames: a row for each trace, a column for each link."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    links = sorted(
        {its.bytes_per_second for found in traces.values() for its in found}, reverse=True
    )
    figure, axes = plt.subplots(
        len(traces),
        len(links),
        figsize=(4 * len(links), 2.5 * len(traces) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for row, (trace, found) in zip(axes, traces.items(), strict=True):
        for axis, link in zip(row, links, strict=True):
            for name in dict.fromkeys(its.name for its in found):
                line = [its for its in found if its.name == name and its.bytes_per_second == link]
                axis.plot(
                    [its.num_frames for its in line],
                    [its.stall_ratio for its in line],
                    marker=".",
                    label=name,
                )
            axis.set_title(f"{trace}, {link / 1e9:g} GB/s", fontsize=8)
            axis.set_ylim(bottom=0)
    axes[-1][0].set_xlabel("expert frames")
    axes[0][0].set_ylabel("share of time stalled")
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncol=2, fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)
