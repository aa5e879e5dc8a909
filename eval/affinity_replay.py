"""Does it pay to decode in halves that share experts? Recorded requests in other batches, replayed.

    python -m eval.affinity_replay --output eval/results/affinity-replay.json

The requests of the reference traces keep their routing and get other company (`eval/batch_schedules.py`): all that run decode
together; or two halves take turns, split by chance or by the product's `plan_affinity`, knowing what they used in their last
steps, or what they will use. Beside it what a server can do without: run half as many, whoever is admitted next. The experts
go through the product's memory manager; all frames are for experts, the same number under every scheme. A pass computes for
`--layer-seconds` in each layer, whoever is in it; an expert that is absent is loaded over a simulated link.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from eval.batch_schedules import (
    Course,
    Library,
    Schedule,
    Scheme,
    as_trace,
    library_of,
    schedule,
)
from eval.replay import frames_of
from eval.replay_memory import LoadCounter, new_memory, run_step
from eval.servers import describe_run
from sglmoe.config import MemoryPolicy
from sglmoe.prediction.trace import load_trace
from sglmoe.scheduler.affinity import NUM_CONSIDERED, Waiting, admission_order, sketch_of
from sglmoe.scheduler.halves import PassCosts, RecentUses, plan_affinity
from sglmoe.units import parse_bytes

TRACES = Path(__file__).parent / "traces"


class Workload(NamedTuple):
    """Requests of these traces, in a random order, each of them so often."""

    traces: tuple[str, ...]
    num_running: int
    repeats: int


WORKLOADS = {
    "mixed, 8": Workload(("mixed-8",), 8, 3),
    "mixed, 32": Workload(("mixed-32",), 32, 4),
    "four domains, 8": Workload(("python-1", "prose-1", "arithmetic-1", "recall-1"), 8, 3),
    "two unlike domains, 8": Workload(("python-1", "arithmetic-1"), 8, 6),
}
SCHEMES = (
    Scheme("together"),
    Scheme("halves by chance", turn_steps=1, split_by="chance"),
    Scheme("halves, last step", turn_steps=1, window=1),
    Scheme("halves, last 8", turn_steps=1),
    Scheme("halves, foreseen", turn_steps=1, window=0),
    Scheme("turns of 8, last 8", turn_steps=8),
    Scheme("together, alike in words, of 4", admit="words", num_considered=4),
    Scheme("together, alike in words", admit="words"),
    Scheme("together, alike in experts", admit="experts"),
    Scheme("half run", share_running=0.5),
    Scheme("half run, alike in words", share_running=0.5, admit="words"),
)
LINKS = ("16GB", "1GB", "250MB")


class Counts(NamedTuple):
    """Of the decode steps of a schedule; or means, over seeds."""

    passes: float
    tokens: float
    activated: float  # experts, of all layers
    misses: float
    loads: float  # groups of them: a latency each
    together: float  # He's objective as it was foreseen, of all who run
    in_halves: float  # and of the two halves
    longest_wait: float  # passes from a token to the next


def count(library: Library, made: Schedule, num_frames: int) -> Counts:
    trace, counter = as_trace(library, made), LoadCounter()
    memory = new_memory(trace, num_frames, counter, policy=MemoryPolicy.COST_AWARE)
    passes = tokens = activated = misses = loads = 0
    for its, layers in zip(made.passes, trace.experts_by_layer(), strict=True):
        before = counter.num_experts, counter.num_groups
        run_step(memory, layers)
        if its.is_decode:
            passes, tokens = passes + 1, tokens + len(its.rows)
            activated += sum(map(len, layers))
            misses += counter.num_experts - before[0]
            loads += counter.num_groups - before[1]
    together, in_halves = np.array(made.foreseen or [(0, 0)]).mean(axis=0).tolist()
    return Counts(passes, tokens, activated, misses, loads, together, in_halves, made.longest_wait)


class Machine(NamedTuple):
    """What passes and loads cost."""

    num_layers: int
    layer_seconds: float
    latency_seconds: float
    expert_bytes: int

    def seconds(self, counts: Counts, bytes_per_second: float) -> tuple[float, float]:
        """Of a decoded token: loads waited for, and if all but the longer of the two were hidden."""
        compute = counts.passes * self.num_layers * self.layer_seconds
        link = counts.loads * self.latency_seconds
        link += counts.misses * self.expert_bytes / bytes_per_second
        return (compute + link) / counts.tokens, max(compute, link) / counts.tokens


def queue_of(library: Library, repeats: int, seed: int) -> list[Course]:
    """A course is known by its array, so each repetition has its own."""
    queue = [
        Course(course.tokens.copy(), course.num_prompt)
        for _ in range(repeats)
        for course in library.courses
    ]
    random.Random(seed).shuffle(queue)
    return queue


def rows_of(name: str, workload: Workload, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    library = library_of([load_trace(TRACES / f"{its}.npz") for its in workload.traces])
    info = library.traces[0].info
    machine = Machine(
        info.num_layers, options.layer_seconds, options.latency, info.geometry.expert_bytes
    )
    for frames in options.expert_frames.split(","):
        num_frames = frames_of(frames, info.num_layers * info.num_experts)
        first: dict[str, float] = {}
        for scheme in tqdm(SCHEMES, f"{name}, {frames}", leave=False):
            runs = []
            for seed in range(options.seeds):
                queue = queue_of(library, workload.repeats, seed)
                made = schedule(library, queue, scheme, num_running=workload.num_running, seed=seed)
                runs.append(count(library, made, num_frames))
            row = row_of(Counts(*map(statistics.mean, zip(*runs, strict=True))), machine)
            first = first or row
            ratios = {key: first[key] / row[key] for key in row if key.startswith("seconds")}
            yield {"workload": name, "frames": frames, "scheme": scheme.name, **row} | {
                key.replace("seconds", "speed"): ratio for key, ratio in ratios.items()
            }


def row_of(counts: Counts, machine: Machine) -> dict[str, float]:
    row = {
        "activated_a_token": counts.activated / counts.tokens,
        "loads_a_token": counts.misses / counts.tokens,
        "together": counts.together,
        "in_halves": counts.in_halves,
        "longest_wait": counts.longest_wait,
    }
    for link in LINKS:
        waited, hidden = machine.seconds(counts, parse_bytes(link, whole_bytes=0))
        row |= {f"seconds_{link}": waited, f"seconds_{link}_hidden": hidden}
    return row


# -------------------------------------------------------------------------------------------------------- the plan's time


def plan_seconds(num_requests: int = 128, num_layers: int = 48, num_experts: int = 128) -> float:
    """Median of a plan for requests whose tokens take 8 random experts a layer, 8 steps back."""
    rng = np.random.default_rng(0)
    share = 8 / num_experts
    counts = rng.binomial(8, share, (num_requests, num_layers, num_experts)).astype(np.uint8)
    uses = RecentUses(counts, 8)
    costs = PassCosts(fixed_seconds=0.0, row_seconds=0.001, load_seconds=0.001)
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        plan_affinity(uses, expert_frames=num_layers * num_experts // 4, costs=costs, turn_steps=8)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def admission_seconds(num_running: int = 255, num_prompt: int = 500) -> float:
    """Median of an order of those that are considered, for one place; prompts of random tokens."""
    rng = np.random.default_rng(0)
    sketches = [
        sketch_of(rng.integers(0, 150_000, num_prompt).tolist())
        for _ in range(num_running + NUM_CONSIDERED)
    ]
    waiting = [Waiting(sketch, 0) for sketch in sketches[num_running:]]
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        admission_order(waiting, sketches[:num_running], num_places=1)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| workload | frames | scheme | activated, loads a token | objective | longest wait | "
        + " | ".join(LINKS)
        + " |",
        "|---" * (6 + len(LINKS)) + "|",
    ]
    for row in rows:
        speeds = [
            f"{row[f'speed_{link}']:.2f}, {row[f'speed_{link}_hidden']:.2f}" for link in LINKS
        ]
        lines.append(
            f"| {row['workload']} | {row['frames']} | {row['scheme']} | {row['activated_a_token']:.1f}, "
            f"{row['loads_a_token']:.2f} | {row['together']:.0f}, {row['in_halves']:.0f} "
            f"| {row['longest_wait']:.0f} | {' | '.join(speeds)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--workloads", default=";".join(WORKLOADS), help="separated by ;")
    parser.add_argument("--expert-frames", default="25%,50%")
    parser.add_argument("--latency", type=float, default=1e-6, help="seconds, of a group of loads")
    parser.add_argument("--layer-seconds", type=float, default=200e-6)
    parser.add_argument("--seeds", type=int, default=3, help="orders of the queue")
    options = parser.parse_args()
    rows = []
    for name in options.workloads.split(";"):
        rows += list(rows_of(name, WORKLOADS[name], options))
    print(table(rows))
    plan, admission = plan_seconds(), admission_seconds()
    print(f"\nA plan for 128 requests, 48 layers of 128 experts: {1000 * plan:.1f} ms")
    print(f"Who of those that wait is next, beside 255 that run: {1000 * admission:.2f} ms")
    if options.output is not None:
        options.output.write_text(report(rows, plan, admission))


COLUMNS = (
    *("activated_a_token", "loads_a_token", "together", "in_halves"),
    *("longest_wait", *(f"speed_{link}" for link in LINKS)),
)


def report(rows: Sequence[dict[str, Any]], plan: float, admission: float) -> str:
    """One line a row, so that the file stays small."""
    head = describe_run() | {
        "plan_seconds": float(f"{plan:.3g}"),
        "admission_seconds": float(f"{admission:.3g}"),
        "columns": COLUMNS,
    }
    lines = []
    for cell, group in groupby(rows, key=lambda row: f"{row['workload']}, {row['frames']}"):
        shown = {its["scheme"]: ",".join(f"{its[key]:.3g}" for key in COLUMNS) for its in group}
        inner = ",\n".join(f"  {json.dumps(name)}: [{values}]" for name, values in shown.items())
        lines.append(f" {json.dumps(cell)}: {{\n{inner}\n }}")
    return json.dumps(head, indent=1)[:-2] + ",\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
