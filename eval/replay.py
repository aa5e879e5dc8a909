"""Replay routing traces against the memory manager, under a link that is only simulated.

    python -m eval.replay TRACE.npz [TRACE.npz ...] [--expert-frames 25%,50%,100%]

Two ways. *Whole*: every call that the server's memory saw, KV and experts, in the same order; on
the same geometry it gives the server's own counters. *Experts only*: the experts of each layer of
each step through so many frames, for comparing policies. What is replayed is the product's own code
(`sglmoe.memory`); time is virtual: a layer takes `--layer-seconds` of compute, a load
`--latency + bytes / --bandwidth`, and a demand load stalls the layer.

Bounds: "oracle" evicts what is needed furthest in the future (Belady's MIN, with the experts of a
layer pinned together); "no cache" loads every expert anew; "no link" computes only.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from eval.servers import describe_run
from sglmoe.memory.arena import Geometry
from sglmoe.memory.experts import Load
from sglmoe.memory.manager import MemoryManager
from sglmoe.prediction.trace import Kind, Totals, Trace, load_trace
from sglmoe.units import parse_bytes

LayerExperts = Sequence[Sequence[Sequence[int]]]  # step, layer -> distinct experts, ascending


class Link(msgspec.Struct, frozen=True):
    """What brings experts in, and what computes meanwhile."""

    bytes_per_second: float
    latency_seconds: float  # of each group of loads
    layer_seconds: float

    def stall_seconds(self, num_loads: int, num_experts: int, expert_bytes: int) -> float:
        """For `num_experts` demand-loaded in `num_loads` groups."""
        return num_loads * self.latency_seconds + num_experts * expert_bytes / self.bytes_per_second


class Outcome(msgspec.Struct, frozen=True):
    """A policy on a trace."""

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


class LoadCounter:
    """Stands where the copier stands in a server."""

    def __init__(self) -> None:
        self.num_groups = 0
        self.num_experts = 0

    def load(self, loads: Sequence[Load]) -> None:
        self.num_groups += 1
        self.num_experts += len(loads)


# ------------------------------------------------------------------------------------------- whole


def replay_whole(trace: Trace, *, num_frames: int | None = None) -> Totals:
    """All of the trace, on the server's own geometry or one with another number of frames.

    Raises ValueError where memory answers otherwise than it did to the server: then what the server
    did next does not follow from the trace any more. A larger arena may answer so, a smaller one will.
    """
    geometry = trace.info.geometry
    if num_frames is not None:
        geometry = msgspec.structs.replace(geometry, num_frames=num_frames)
    memory = new_memory(trace, geometry, LoadCounter())
    layers = trace.experts_by_layer()
    requests = [trace.tokens_of(i) for i in range(len(trace.info.namespaces))]
    for index, (kind, request, amount, limit, result) in enumerate(trace.operations.tolist()):
        tokens = b""
        if kind in (Kind.ADMIT, Kind.COMMIT, Kind.RELEASE):
            tokens = requests[request][:amount].tobytes()
        got = apply_operation(trace, memory, layers, (kind, request, amount, limit), tokens)
        if got != result and kind in (Kind.ADMIT, Kind.EXTEND, Kind.COMMIT):
            raise ValueError(
                f"operation {index}, {Kind(kind).name} of request {request}, gave {got} where the server "
                f"had {result}: with {geometry.num_frames} frames the run would have gone otherwise; use "
                f"the {trace.info.geometry.num_frames} it was recorded with, or --expert-frames"
            )
    snapshot = memory.snapshot(0)
    return Totals(*(getattr(snapshot, name) for name in Totals.__struct_fields__))


def apply_operation(
    trace: Trace,
    memory: MemoryManager,
    layers: LayerExperts,
    operation: tuple[int, int, int, int],
    tokens: bytes,
) -> int:
    kind, request, amount, limit = operation
    rid = str(request)
    match kind:
        case Kind.ADMIT:
            namespace = trace.info.namespaces[request]
            limited = None if limit < 0 else limit
            return memory.admit(rid, tokens, namespace, max_cached_tokens=limited)
        case Kind.EXTEND:
            return memory.extend(rid, amount)
        case Kind.COMMIT:
            return memory.commit(rid, tokens, amount)
        case Kind.RELEASE:
            memory.release(rid, tokens, amount)
        case Kind.FLUSH:
            memory.flush_cache()
        case Kind.FORWARD:
            run_step(memory, layers[request])
    return 0


def run_step(memory: MemoryManager, layers: Sequence[Sequence[int]]) -> None:
    memory.begin_step()
    for layer, experts in enumerate(layers):
        for _ in memory.waves(layer, experts):
            pass


def new_memory(trace: Trace, geometry: Geometry, counter: LoadCounter) -> MemoryManager:
    return MemoryManager(
        geometry,
        num_layers=trace.info.num_layers,
        num_experts=trace.info.num_experts,
        floor_frames=trace.info.floor_frames,
        load_experts=counter.load,
    )


# ------------------------------------------------------------------------------------ experts only


def replay_lru(trace: Trace, num_frames: int, link: Link) -> Outcome:
    """The product's memory manager, all of its frames for experts."""
    frames = max(num_frames, trace.info.floor_frames + 1)
    geometry = msgspec.structs.replace(trace.info.geometry, num_frames=frames)
    counter = LoadCounter()
    memory = new_memory(trace, geometry, counter)
    layers = trace.experts_by_layer()
    started = time.perf_counter()
    for step in layers:
        run_step(memory, step)
    seconds = time.perf_counter() - started
    snapshot = memory.snapshot(0)
    return outcome(
        "lru",
        trace,
        link,
        frames,
        snapshot.expert_hits,
        snapshot.expert_misses,
        counter.num_groups,
        seconds,
    )


def replay_oracle(trace: Trace, num_frames: int, link: Link) -> Outcome:
    """Belady's MIN: nothing can hit more often.

    A layer that needs more experts than there are frames takes them in waves; the oracle then keeps
    the best of all it saw, which may be one expert more than a server could: it stays a bound.
    """
    started = time.perf_counter()
    hits, misses, stalls = oracle_counts(trace.experts_by_layer(), num_frames)
    seconds = time.perf_counter() - started
    return outcome("oracle", trace, link, num_frames, hits, misses, stalls, seconds)


def oracle_counts(layers: LayerExperts, num_frames: int) -> tuple[int, int, int]:
    """Hits, misses, and layers with a miss."""
    accesses = [
        [(layer, e) for e in experts] for step in layers for layer, experts in enumerate(step)
    ]
    next_uses = iter(next_uses_of(accesses))
    due: dict[tuple[int, int], int] = {}  # resident -> its next use
    farthest: list[
        tuple[int, tuple[int, int]]
    ] = []  # (-next use, expert), outdated ones among them
    hits = misses = stalls = 0
    for experts in accesses:
        missing = [expert for expert in experts if expert not in due]
        hits += len(experts) - len(missing)
        misses += len(missing)
        stalls += bool(missing)
        if (
            len(experts) <= num_frames
        ):  # all at once: those of this layer, due now, are never farthest
            evict_farthest(due, farthest, num_frames - len(missing))
        for expert in experts:
            use = next(next_uses)
            due[expert] = use
            heappush(farthest, (-use, expert))
        evict_farthest(due, farthest, num_frames)
    return hits, misses, stalls


def evict_farthest(
    due: dict[tuple[int, int], int], farthest: list[tuple[int, tuple[int, int]]], num_kept: int
) -> None:
    while len(due) > num_kept:
        _, expert = heappop(farthest)  # outdated entries are in the past, behind all others
        del due[expert]


def next_uses_of(accesses: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    """For each access in order, when the same expert is accessed next; `len(accesses)` for never."""
    last = len(accesses)
    upcoming: dict[tuple[int, int], int] = {}
    uses: list[list[int]] = []
    for now in range(last - 1, -1, -1):
        uses.append([upcoming.get(expert, last) for expert in accesses[now]])
        upcoming |= dict.fromkeys(accesses[now], now)
    return list(chain.from_iterable(reversed(uses)))


def bounds(trace: Trace, link: Link) -> Iterator[Outcome]:
    """What no cache and no link at all would give."""
    layers = trace.experts_by_layer()
    total = sum(len(experts) for step in layers for experts in step)
    num_layers = sum(len(step) for step in layers)
    yield outcome("no cache", trace, link, 0, 0, total, num_layers, math.nan)
    yield outcome("no link", trace, link, 0, total, 0, 0, math.nan)


def outcome(
    policy: str,
    trace: Trace,
    link: Link,
    frames: int,
    hits: int,
    misses: int,
    stalls: int,
    seconds: float,
) -> Outcome:
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


POLICIES = {"lru": replay_lru, "oracle": replay_oracle}

# ------------------------------------------------------------------------------------ command line


def frames_of(text: str, trace: Trace) -> int:
    """ "25%" of all experts, or a number."""
    if not text.endswith("%"):
        return int(text)
    return round(float(text[:-1]) / 100 * trace.info.num_layers * trace.info.num_experts)


def describe(path: Path, trace: Trace) -> str:
    tokens = np.diff(trace.step_bounds)
    return (
        f"{path.name}: {trace.info.model}, {len(trace.token_ids)} tokens in {trace.num_steps} steps "
        f"(median {int(np.median(tokens))} a step), {trace.info.num_layers} layers x "
        f"{trace.info.num_experts} experts, top {trace.info.top_k}"
    )


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| policy | frames | hit ratio | stalls | MiB moved | ms a step |",
        "|---|---|---|---|---|---|",
    ]
    for its in outcomes:
        lines.append(
            f"| {its.policy} | {its.frames or '-'} | {its.hit_ratio:.1%} | {its.stalls} "
            f"| {its.bytes_moved / 2**20:.1f} | {its.step_seconds * 1000:.3f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--expert-frames", default="10%,25%,50%,75%")
    parser.add_argument("--policies", default=",".join(POLICIES))
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
        whole = replay_whole(trace)
        print(
            f"Whole: the server's counters {'reproduced' if whole == trace.info.totals else 'MISSED'}."
        )
        outcomes = [*bounds(trace, link)]
        for frames in options.expert_frames.split(","):
            for policy in options.policies.split(","):
                outcomes.append(POLICIES[policy](trace, frames_of(frames, trace), link))
        print(table(outcomes))
        report[path.name] = {
            "reproduced": whole == trace.info.totals,
            "outcomes": [
                msgspec.structs.asdict(its) | {"hit_ratio": its.hit_ratio} for its in outcomes
            ],
        }
    if options.output is not None:
        options.output.write_text(json.dumps(describe_run() | {"traces": report}, indent=1) + "\n")
    return 0 if all(its["reproduced"] for its in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
