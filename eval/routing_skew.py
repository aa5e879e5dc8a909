"""How uneven routing is in the reference traces, as the one number that `sglmoe.plan` takes.

    python -m eval.routing_skew eval/traces/*.npz --output eval/results/routing-skew.json

Each trace's experts are replayed through several numbers of frames with the product's own memory; counted
are the hits of its decode steps. For each number of requests at a time the skew is sought with which
`sglmoe.plan` predicts these hit ratios best (least squares). So it stands for all that a plan leaves out:
that tokens of a request resemble each other, and what the policy makes of it.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.replay_memory import LoadCounter, new_memory, run_step
from eval.servers import describe_run
from sglmoe.config import MemoryPolicy
from sglmoe.memory.residency import MissCurve
from sglmoe.plan.routing import expert_uses
from sglmoe.prediction.trace import Trace, TraceInfo, load_trace

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
SKEWS = np.arange(0, 10.01, 0.05)


class Hits(NamedTuple):
    """Of the decode steps of a replay."""

    num_running: float  # mean
    share: float  # of the experts, that there are frames for
    hit_ratio: float


def decode_hits(trace: Trace, share: float) -> Hits:
    """The hit ratio of steps in which every request computes one token; the others run as well."""
    info = trace.info
    frames = max(round(share * info.num_layers * info.num_experts), info.floor_frames + 1)
    memory = new_memory(trace, frames, LoadCounter(), policy=MemoryPolicy.COST_AWARE)
    hits = misses = rows = steps = 0
    seen = memory.snapshot(0)
    for step, (experts, owners) in enumerate(
        zip(trace.experts_by_layer(), owners_by_step(trace), strict=True)
    ):
        run_step(memory, experts)
        now = memory.snapshot(step)
        if len(owners) == len(set(owners)):
            hits += now.expert_hits - seen.expert_hits
            misses += now.expert_misses - seen.expert_misses
            rows, steps = rows + len(owners), steps + 1
        seen = now
    return Hits(rows / steps, share, hits / (hits + misses))


def owners_by_step(trace: Trace) -> Iterator[list[int]]:
    for start, stop in zip(trace.step_bounds[:-1], trace.step_bounds[1:], strict=True):
        yield trace.owners[start:stop].tolist()


def predicted(info: TraceInfo, hits: Hits, skew: float) -> float:
    curve = MissCurve(expert_uses(info.num_layers, info.num_experts, info.top_k, skew))
    frames = round(hits.share * info.num_layers * info.num_experts)
    used = curve.misses(hits.num_running, 0)
    return 1 - curve.misses(hits.num_running, frames) / used


def best_skew(info: TraceInfo, measured: Sequence[Hits]) -> tuple[float, float]:
    """The skew, and the root of the mean square of what it gets wrong."""

    def error(skew: float) -> float:
        return sum((predicted(info, hits, skew) - hits.hit_ratio) ** 2 for hits in measured)

    best = min(SKEWS.tolist(), key=error)
    return round(best, 2), (error(best) / len(measured)) ** 0.5


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    by_clients: dict[int, list[Hits]] = {}
    for path in options.traces:
        trace = load_trace(path)
        clients = int(path.stem.rpartition("-")[2])  # as eval.reference_traces names them
        by_clients.setdefault(clients, []).extend(decode_hits(trace, share) for share in SHARES)
    report: dict[str, Any] = {}
    for clients, measured in sorted(by_clients.items()):
        skew, error = best_skew(trace.info, measured)
        mean = sum(hits.num_running for hits in measured) / len(measured)
        report[str(clients)] = {"num_running": round(mean, 1), "skew": skew}
        report[str(clients)]["rms_error"] = round(error, 4)
        print(f"{clients} at a time: skew {skew:.2f}, hit ratios off by {error:.3f} (rms)")
        for hits in measured:
            print(
                f"  {hits.num_running:5.1f} run, frames for {hits.share:.1%}: "
                f"{hits.hit_ratio:.1%} hit, {predicted(trace.info, hits, skew):.1%} predicted"
            )
        report[str(clients)]["hits"] = [hits._asdict() for hits in measured]
    if options.output is not None:
        options.output.write_text(
            json.dumps(describe_run() | {"by_clients": report}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
