"""Replay routing traces against the memory manager, under a link that is only simulated.

    python -m eval.replay TRACE.npz [TRACE.npz ...] [--expert-frames 25%,50%,100%] [--frames 50%,75%]

What is replayed is the product's own code (`sglmoe.memory`); time is virtual: a layer takes
`--layer-seconds` of compute, a load `--latency + bytes / --bandwidth`, and a demand load stalls the
layer. Three ways:

* *Whole*: every call that the server's memory saw, KV and experts, in the same order; on the same
  arena with the same policy it gives the server's own counters.
* *Experts only* (`--expert-frames`): the experts of each layer of each step through so many frames,
  by policy. Bounds: "oracle" evicts what is needed furthest in the future (Belady's MIN, with the
  experts of a layer pinned together); "no cache" loads every expert anew; "no link" computes only.
* *KV and experts* (`--frames`, of what all experts and all KV that ran at once take): the same calls
  in an arena of another size or under another policy, in seconds saved. What the server would have
  computed otherwise does not follow from a trace; that it computes the same is assumed.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from eval.oracle import LayerExperts, oracle_counts
from eval.replay_memory import (
    LoadCounter,
    Savings,
    compare_savings,
    new_memory,
    replay_whole,
    run_step,
    whole_frames,
)
from eval.servers import describe_run
from sglmoe.config import MemoryPolicy
from sglmoe.prediction.trace import Trace, load_trace
from sglmoe.units import parse_bytes

EXPERT_POLICIES = ("lru", "lfu", "cost-aware", "oracle")


class Link(msgspec.Struct, frozen=True):
    """What brings experts in, and what computes meanwhile."""

    bytes_per_second: float
    latency_seconds: float  # of each group of loads
    layer_seconds: float

    def stall_seconds(self, num_loads: int, num_experts: int, expert_bytes: int) -> float:
        """For `num_experts` demand-loaded in `num_loads` groups."""
        return num_loads * self.latency_seconds + num_experts * expert_bytes / self.bytes_per_second


class Outcome(msgspec.Struct, frozen=True):
    """A policy on the experts of a trace."""

    policy: str
    frames: int
    hits: int
    misses: int
    stalls: int  # groups of demand loads: layers, or waves of them
    bytes_moved: int
    step_seconds: float  # mean
    replay_layers_per_second: float

    @property
    def hit_ratio(self) -> float:
        return self.hits / (self.hits + self.misses)


# ------------------------------------------------------------------------------------ experts only


def replay_experts(trace: Trace, num_frames: int, link: Link, policy: str) -> Outcome:
    """All frames for experts. The oracle is a bound: nothing can hit more often.

    A layer that needs more experts than there are frames takes them in waves; the oracle then keeps
    the best of all it saw, which may be one expert more than a server could.
    """
    layers = trace.experts_by_layer()
    started = time.perf_counter()
    if policy == "oracle":
        hits, misses, stalls = oracle_counts(layers, num_frames)
    else:
        num_frames = max(num_frames, trace.info.floor_frames + 1)
        hits, misses, stalls = policy_counts(trace, layers, num_frames, MemoryPolicy(policy))
    seconds = time.perf_counter() - started
    return outcome(policy, trace, link, num_frames, (hits, misses, stalls), seconds)


def policy_counts(
    trace: Trace, layers: LayerExperts, num_frames: int, policy: MemoryPolicy
) -> tuple[int, int, int]:
    """Hits, misses, and groups of loads."""
    counter = LoadCounter()
    memory = new_memory(trace, num_frames, counter, policy=policy)
    for step in layers:
        run_step(memory, step)
    snapshot = memory.snapshot(0)
    return snapshot.expert_hits, snapshot.expert_misses, counter.num_groups


def bounds(trace: Trace, link: Link) -> Iterator[Outcome]:
    """What no cache and no link at all would give."""
    layers = trace.experts_by_layer()
    total = sum(len(experts) for step in layers for experts in step)
    num_layers = sum(len(step) for step in layers)
    yield outcome("no cache", trace, link, 0, (0, total, num_layers), math.nan)
    yield outcome("no link", trace, link, 0, (total, 0, 0), math.nan)


def outcome(
    policy: str,
    trace: Trace,
    link: Link,
    frames: int,
    counts: tuple[int, int, int],
    seconds: float,
) -> Outcome:
    hits, misses, stalls = counts
    expert_bytes = trace.info.geometry.expert_bytes
    num_layers = trace.num_steps * trace.info.num_layers
    stall = link.stall_seconds(stalls, misses, expert_bytes)
    return Outcome(
        policy=policy,
        frames=frames,
        hits=hits,
        misses=misses,
        stalls=stalls,
        bytes_moved=misses * expert_bytes,
        step_seconds=(num_layers * link.layer_seconds + stall) / trace.num_steps,
        replay_layers_per_second=num_layers / seconds,
    )


# ------------------------------------------------------------------------------------ command line


def frames_of(text: str, whole: int) -> int:
    """ "25%" of the whole, or a number."""
    return int(text) if not text.endswith("%") else round(float(text[:-1]) / 100 * whole)


def describe(path: Path, trace: Trace) -> str:
    tokens = np.diff(trace.step_bounds)
    return (
        f"{path.name}: {trace.info.model}, {len(trace.token_ids)} tokens in {trace.num_steps} steps "
        f"(median {int(np.median(tokens))} a step), {trace.info.num_layers} layers x "
        f"{trace.info.num_experts} experts, top {trace.info.top_k}"
    )


def expert_table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| policy | expert frames | hit ratio | stalls | MiB moved | ms a step |",
        "|---|---|---|---|---|---|",
    ]
    for its in outcomes:
        lines.append(
            f"| {its.policy} | {its.frames or '-'} | {its.hit_ratio:.1%} | {its.stalls} "
            f"| {its.bytes_moved / 2**20:.1f} | {its.step_seconds * 1000:.3f} |"
        )
    return "\n".join(lines)


def savings_table(savings: Sequence[Savings]) -> str:
    best = max(its.seconds_saved for its in savings)
    lines = [
        "| policy | frames | experts hit | tokens cached | requests rejected | seconds saved | of the best |",
        "|---|---|---|---|---|---|---|",
    ]
    for its in savings:
        lines.append(
            f"| {its.policy} | {its.frames} | {its.expert_hits} | {its.cached_tokens} "
            f"| {its.rejected} | {its.seconds_saved:.3f} | {its.seconds_saved / best:.1%} |"
        )
    return "\n".join(lines)


def replay_all(trace: Trace, options: argparse.Namespace, link: Link) -> dict[str, Any]:
    """Print what becomes of a trace; the figures."""
    whole = replay_whole(trace)
    reproduced = whole == trace.info.totals
    print(f"Whole: the server's counters {'reproduced' if reproduced else 'MISSED'}.")
    num_experts = trace.info.num_layers * trace.info.num_experts
    outcomes = [*bounds(trace, link)]
    for frames in options.expert_frames.split(","):
        for policy in options.policies.split(","):
            outcomes.append(replay_experts(trace, frames_of(frames, num_experts), link, policy))
    print(expert_table(outcomes))
    savings = []
    for frames in filter(None, options.frames.split(",")):
        savings.append(compare_savings(trace, frames_of(frames, whole_frames(trace))))
        print(savings_table(savings[-1]))
    return {
        "reproduced": reproduced,
        "experts": [msgspec.structs.asdict(its) | {"hit_ratio": its.hit_ratio} for its in outcomes],
        "savings": [msgspec.structs.asdict(its) for group in savings for its in group],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--expert-frames", default="25%,50%,75%")
    parser.add_argument("--frames", default="")
    parser.add_argument("--policies", default=",".join(EXPERT_POLICIES))
    parser.add_argument("--bandwidth", default="25GB", help="bytes a second")
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds, of a group of loads")
    parser.add_argument("--layer-seconds", type=float, default=200e-6)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    bandwidth = parse_bytes(options.bandwidth, whole_bytes=0)
    link = Link(bandwidth, options.latency, options.layer_seconds)
    report: dict[str, Any] = {}
    for path in options.traces:
        trace = load_trace(path)
        print(f"\n{describe(path, trace)}")
        report[path.name] = replay_all(trace, options, link)
    if options.output is not None:
        options.output.write_text(json.dumps(describe_run() | {"traces": report}, indent=1) + "\n")
    return 0 if all(its["reproduced"] for its in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
