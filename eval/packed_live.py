"""A trace's routing through the product's memory, copier and packed planner, with the bytes of a packed checkpoint.

    python -m eval.random_model --dtype bfloat16 --output MODEL && python -m sglmoe.pack --model-path MODEL
    python -m eval.packed_live --model-path MODEL --trace eval/traces/mixed-8.npz [--read-rate 150MB] [--expert-frames 25%,50%]

Experts are read, decoded, kept and evicted as in a server; layers compute nothing, and there is no KV. So what is measured is
what steps wait for. Routing is the trace's, from another model of as many layers and experts. --read-rate makes the disk
slower than it is; without it experts come from the page cache.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from eval.replay import frames_of
from eval.serving_runs import markdown_table
from sglmoe.config import MemoryPolicy, parse_packed_share
from sglmoe.memory.arena import Geometry
from sglmoe.memory.host_tier import HostTier, TieredStore, make_blocks
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.read_rate import ReadRate
from sglmoe.memory.step_times import StepTimes
from sglmoe.memory.store import ExpertStore
from sglmoe.memory.transfer import HostCopier
from sglmoe.memory.use_counter import UseCounter
from sglmoe.prediction.trace import Trace, load_trace
from sglmoe.units import parse_bytes
from sglmoe.worker.packed_experts import decoding_seconds, plan_packing, use_packed
from sglmoe.worker.packed_planner import PackedPlanner
from sglmoe.worker.step_watch import Price, StepKind, StepWatch

NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
MOST_DECODING = 64  # a step of more tokens computed prompts


class Outcome(NamedTuple):
    """Of the steps after the warm-up; ratios are of the experts needed."""

    stall_seconds: float  # of a step, mean
    hit_ratio: float
    packed_ratio: float  # decoded from the arena
    packed_frames: int  # in the end, as the next
    packed_experts: int
    decode_ratio: float


def read_store(model: Path, shape: tuple[int, int], rate: ReadRate | None) -> ExpertStore:
    """As the server's, of a checkpoint in one file."""
    store = ExpertStore(rate=rate)
    with safe_open(model / "model.safetensors", framework="pt") as file:
        for layer, expert in np.ndindex(shape):
            for part, name in NAMES.items():
                tensor = file.get_tensor(f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight")
                store.put(layer, expert, part, tensor.view(-1).view(torch.uint8).numpy())
    store.unmap()
    use_packed(store, "on", str(model))
    return store


class Bench:
    """What a worker puts together, but for the model."""

    def __init__(self, store: ExpertStore, trace: Trace, num_frames: int, share: float | None):
        info = trace.info
        expert_bytes, shape = store.expert_bytes(), (info.num_layers, info.num_experts)
        geometry = Geometry(
            num_frames=num_frames + 1,  # one for KV, which is never asked for
            frame_bytes=expert_bytes,
            expert_bytes=expert_bytes,
            page_bytes=expert_bytes,
            page_tokens=1,
            pages_per_frame=1,
            page_rows=1,
        )
        blocks = make_blocks(0, store, as_stored=True)
        tier = HostTier(blocks, num_layers=shape[0], num_experts=shape[1], as_stored=True)
        copier = HostCopier(
            np.zeros(geometry.arena_bytes, np.uint8),
            frame_bytes=expert_bytes,
            store=TieredStore(tier, store),
            num_threads=os.cpu_count() or 1,
        )
        packing = plan_packing(
            store,
            share,
            copier.decode_ratio,
            frame_bytes=expert_bytes,
            time_decoding=lambda: decoding_seconds(store),
        )
        self.decode_ratio = copier.decode_ratio
        self.memory = MemoryManager(
            geometry,
            num_layers=shape[0],
            num_experts=shape[1],
            floor_frames=info.floor_frames,
            load_experts=copier.load,
            policy=MemoryPolicy.COST_AWARE,
            packing=packing,
        )
        self._uses, times = UseCounter(*shape), StepTimes()
        self._watch = StepWatch(
            times, Price(10**6, 10**6), num_experts=0, decode_ratio=packing.decode_ratio
        )
        self._planner = None
        if packing.expert_bytes:
            self._planner = PackedPlanner(
                self.memory,
                packing,
                times=times,
                uses=self._uses,
                frame_bytes=expert_bytes,
                floor_frames=info.floor_frames,
            )

    def step(self, layers: list[list[int]], num_tokens: int) -> None:
        started = time.perf_counter()
        self.memory.begin_step()
        for layer, experts in enumerate(layers):
            used = np.asarray(experts, np.intp)
            self._uses.note(layer, used)
            for _ in self.memory.waves(layer, used):
                pass
        is_decoding = num_tokens <= MOST_DECODING
        decoding: Any = [None] * num_tokens if is_decoding else []
        kind = StepKind(decoding, 0 if is_decoding else num_tokens)
        snapshot = self.memory.snapshot(0)
        self._watch.step_done(kind, snapshot, time.perf_counter() - started)
        if price := self._watch.new_price():
            self.memory.set_prices(**price._asdict())
        if self._planner is not None:
            self._planner.step_done(kind, snapshot)


def measure(bench: Bench, trace: Trace, *, warmup: int, num_steps: int) -> Outcome:
    layers, tokens = trace.experts_by_layer(), np.diff(trace.step_bounds).tolist()
    for step in range(warmup):
        bench.step(layers[step], tokens[step])
    before = bench.memory.snapshot(0)
    stop = min(warmup + num_steps, trace.num_steps)
    for step in range(warmup, stop):
        bench.step(layers[step], tokens[step])
    after = bench.memory.snapshot(0)
    hits = after.expert_hits - before.expert_hits
    needed = hits + after.expert_misses - before.expert_misses
    return Outcome(
        stall_seconds=(after.stall_seconds - before.stall_seconds) / (stop - warmup),
        hit_ratio=hits / needed,
        packed_ratio=(after.packed_hits - before.packed_hits) / needed,
        packed_frames=after.packed_frames,
        packed_experts=after.packed_experts,
        decode_ratio=bench.decode_ratio(),
    )


def line(frames: str, share: str, its: Outcome, off: Outcome) -> list[str]:
    return [
        frames,
        share,
        f"{1000 * its.stall_seconds:.1f}",
        f"{its.stall_seconds / off.stall_seconds:.2f}",
        f"{its.hit_ratio:.0%} + {its.packed_ratio:.0%}",
        f"{its.packed_frames}: {its.packed_experts}",
        f"{its.decode_ratio:.2f}",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--read-rate", help="bytes a second, such as 150MB")
    parser.add_argument("--expert-frames", default="25%,50%")
    parser.add_argument("--shares", default="off,30%,60%,auto")
    parser.add_argument("--warmup", type=int, default=64, help="steps")
    parser.add_argument("--steps", type=int, default=96, help="that are measured")
    options = parser.parse_args(arguments)
    trace = load_trace(options.trace)
    shape = trace.info.num_layers, trace.info.num_experts
    rate = options.read_rate and ReadRate(parse_bytes(options.read_rate, whole_bytes=0))
    store = read_store(options.model_path, shape, rate or None)
    rows = []
    for frames in options.expert_frames.split(","):
        outcomes: dict[str, Outcome] = {}
        for share in tqdm(options.shares.split(","), frames):
            num_frames = frames_of(frames, shape[0] * shape[1])
            bench = Bench(store, trace, num_frames, parse_packed_share(share))
            outcomes[share] = measure(bench, trace, warmup=options.warmup, num_steps=options.steps)
            print(frames, share, outcomes[share], flush=True)
            rows.append(line(frames, share, outcomes[share], next(iter(outcomes.values()))))
    head = [
        "bytes",
        "share",
        "stall ms",
        "ratio",
        "in frames + packed",
        "frames: experts",
        "decode / load",
    ]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
