"""The runs of `eval.serving` as they were written, and what is said of several rounds: medians and ratios."""

import json
import lzma
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Groups = dict[tuple[str, str, int], list[Row]]  # system, phase, concurrency: a row for each round


def read_runs(folder: Path) -> tuple[dict[str, Any], Groups]:
    """What was run where, and the runs by what they measured, in the order of the file.

    `runs.jsonl` as `eval.serving` writes it, or `runs.jsonl.xz`: a tenth of the size, for keeping.
    """
    path, packed = folder / "runs.jsonl", folder / "runs.jsonl.xz"
    text = path.read_text() if path.exists() else lzma.decompress(packed.read_bytes()).decode()
    first, *lines = text.splitlines()
    groups: Groups = {}
    for line in lines:
        row = json.loads(line)
        row |= shares(row)
        groups.setdefault((row["system"], row["phase"], row["concurrency"]), []).append(row)
    return json.loads(first), groups


def shares(row: Row) -> dict[str, float]:
    """In %, of a server that counts them. Where nothing was needed nothing was missed."""
    found: dict[str, float] = {}
    if "expert_hits" in row:
        found["hit_ratio"] = percentage(row["expert_hits"], row["expert_misses"])
        # Misses all the same, but decoded from the arena; runs of before that was built have none.
        needed = row["expert_hits"] + row["expert_misses"]
        found["packed_ratio"] = 100 * row.get("packed_hits", 0) / max(1, needed)
        found["stall_share"] = 100 * row["stall_seconds"] / row["duration"]
    if "cache_hit_tokens" in row:
        found["prefix_hit_ratio"] = percentage(row["cache_hit_tokens"], row["prefill_tokens"])
    return found


def percentage(hits: float, misses: float) -> float:
    return 100 * hits / (hits + misses) if hits + misses else 100.0


def median(rows: Sequence[Row], figure: str) -> float | None:
    return statistics.median(row[figure] for row in rows) if figure in rows[0] else None


def round_ratios(rows: Sequence[Row], baseline: Sequence[Row], figure: str) -> list[float]:
    """Each round beside the same round of its baseline; who was interrupted has fewer."""
    beside = {row["round"]: row[figure] for row in baseline}
    return [row[figure] / beside[row["round"]] for row in rows if row["round"] in beside]


def ratio(rows: Sequence[Row], baseline: Sequence[Row], figure: str) -> str:
    """Median and extremes of the rounds' ratios; nothing if they have no round in common."""
    values = round_ratios(rows, baseline, figure)
    if not values:
        return ""
    return f"{statistics.median(values):.2f} [{min(values):.2f} .. {max(values):.2f}]"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = "|---" * len(head) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(c)} |" for c in lines)])
