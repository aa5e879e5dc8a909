"""Replay the experts of routing traces through frames and host memory: what does host memory save?

    python -m eval.replay_tiers TRACE.npz [TRACE.npz ...] [--expert-frames 25%] [--host-blocks 25%]

What is replayed is the product's own code: `MemoryManager`, `HostTier`, `plan_promotions`. The disk is
made up: in the background it reads at most one expert a layer. Beside it, on the same misses of the
frames: the first experts that fit, for ever; LRU, which reads each missed expert into host memory;
and Belady's oracle. These two begin empty, the others full.
"""

import argparse
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from eval.oracle import next_uses_of
from eval.replay import describe, frames_of
from sglmoe.config import MemoryPolicy
from sglmoe.memory.experts import ABSENT, Load
from sglmoe.memory.host_tier import HostTier
from sglmoe.memory.link_gate import LinkGate
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.promoter import Promoter
from sglmoe.memory.store import Bytes, ExpertStore
from sglmoe.prediction.trace import Trace, load_trace

Expert = tuple[int, int]


class TierOutcome(msgspec.Struct, frozen=True):
    """A policy of host memory, on the misses of the frames."""

    policy: str
    hit_ratio: float
    reads_per_miss: float  # into host memory


class NoDisk(ExpertStore):
    """Every expert is one byte, at once."""

    def read(
        self,
        layer: int,
        expert: int,
        target: Bytes,
        *,
        before_chunk: Callable[[], None] | None = None,
    ) -> int:
        return 1


class MissLog:
    """Stands where the copier stands in a server."""

    def __init__(self, tier: HostTier):
        self._tier = tier
        self.misses: list[Expert] = []

    def load(self, loads: Sequence[Load]) -> None:
        for load in loads:
            self.misses.append((load.layer, load.expert))
            block = self._tier.pin(load.layer, load.expert)
            if block is not None:
                self._tier.unpin(block)


def replay_host(
    trace: Trace,
    num_frames: int,
    num_blocks: int,
    policy: MemoryPolicy = MemoryPolicy.COST_AWARE,
) -> tuple[TierOutcome, list[Expert]]:
    """The product, and what its frames missed. Host memory is full when the first request comes."""
    num_layers, num_experts = trace.info.num_layers, trace.info.num_experts
    blocks = np.zeros((num_blocks, 1), np.uint8)
    tier = HostTier(blocks, num_layers=num_layers, num_experts=num_experts)
    log = MissLog(tier)
    memory = MemoryManager(
        msgspec.structs.replace(trace.info.geometry, num_frames=num_frames),
        num_layers=num_layers,
        num_experts=num_experts,
        floor_frames=trace.info.floor_frames,
        load_experts=log.load,
        policy=policy,
    )
    promoter = Promoter(
        tier,
        NoDisk(),
        LinkGate(),
        heat=lambda: memory.expert_demand,
        residents=lambda: memory.frame_table != ABSENT,
    )
    while promoter.promote_some():
        pass
    num_at_start = tier.counters()["host_promoted"]
    for step in trace.experts_by_layer():
        memory.begin_step()
        for layer, experts in enumerate(step):
            for _ in memory.waves(layer, experts):
                pass
            promoter.promote_some(limit=1)
    counters, num_misses = tier.counters(), max(1, len(log.misses))
    num_reads = counters["host_promoted"] - num_at_start
    hit_ratio = counters["host_hits"] / num_misses
    return TierOutcome("sglmoe", hit_ratio, num_reads / num_misses), log.misses


def first_that_fit(misses: Sequence[Expert], num_blocks: int, num_experts: int) -> TierOutcome:
    hits = sum(layer * num_experts + expert < num_blocks for layer, expert in misses)
    return TierOutcome("first that fit", hits / max(1, len(misses)), 0.0)


def lru(misses: Sequence[Expert], num_blocks: int) -> TierOutcome:
    held: OrderedDict[Expert, None] = OrderedDict()
    hits = 0
    for expert in misses:
        hits += expert in held
        held[expert] = None
        held.move_to_end(expert)
        if len(held) > num_blocks:
            held.popitem(last=False)
    hit_ratio = hits / max(1, len(misses))
    return TierOutcome("LRU", hit_ratio, 1 - hit_ratio)


def oracle(misses: Sequence[Expert], num_blocks: int) -> TierOutcome:
    next_uses = next_uses_of([[expert] for expert in misses])
    due: dict[Expert, int] = {}
    hits = 0
    for expert, next_use in zip(misses, next_uses, strict=True):
        hits += expert in due
        due[expert] = next_use
        if len(due) > num_blocks:
            del due[max(due, key=due.__getitem__)]
    hit_ratio = hits / max(1, len(misses))
    return TierOutcome("oracle", hit_ratio, 1 - hit_ratio)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument(
        "--expert-frames", default="25%", help="a number, or a share of all experts"
    )
    parser.add_argument("--host-blocks", default="25%", help="likewise")
    options = parser.parse_args(arguments)
    for path in options.traces:
        trace = load_trace(path)
        num_all = trace.info.num_layers * trace.info.num_experts
        num_frames = frames_of(options.expert_frames, num_all)
        num_blocks = frames_of(options.host_blocks, num_all)
        ours, misses = replay_host(trace, num_frames, num_blocks)
        first = first_that_fit(misses, num_blocks, trace.info.num_experts)
        print(f"\n{describe(path, trace)}")
        print(
            f"{num_frames} frames miss {len(misses)} experts; host memory has {num_blocks} blocks\n"
        )
        print("| host memory | hit ratio | reads into it per miss |\n|---|---|---|")
        for its in (first, lru(misses, num_blocks), ours, oracle(misses, num_blocks)):
            print(f"| {its.policy} | {its.hit_ratio:.1%} | {its.reads_per_miss:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
