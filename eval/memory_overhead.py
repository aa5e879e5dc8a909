"""What the memory manager itself takes of a decode step, by part: no model runs, no byte is moved.

    python -m eval.memory_overhead [--requests 64] [--resident 100%] [--lent [--follow 16]] [--profile FILE]

A model of `--layers` x `--experts` (by default Qwen3-30B-A3B's 48 x 128, top 8, in frames of 6 pages
of 16 tokens), `--requests` that decode together, each token's experts drawn anew. The first steps,
which fill the arena, are not counted. `--resident`: the share of the experts that there are frames
for; below 100 % loads are simulated and what is timed is choosing who gives way. `--skew`: experts are as popular as in a Zipf
distribution of that exponent, each layer's in an order of its own. `--lent`: steps run without the host, which lends frames
before and takes them back behind; what the device does is not timed. `--follow`: so many steps go on with what was lent once,
each begun before memory hears of the one in front of it.
"""

import argparse
import cProfile
import json
import pstats
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from eval.servers import describe_run
from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Geometry
from sglmoe.memory.experts import Load
from sglmoe.memory.frame_sets import USED, FrameSets
from sglmoe.memory.manager import MemoryManager
from sglmoe.worker.step_state import Sizes, StepState

PAGE_TOKENS, PAGES_PER_FRAME, TOKEN_BYTES = 16, 6, 98304
PROMPT_TOKENS = 1000
NUM_WARMUP_STEPS = 40


def no_load(loads: Sequence[Load]) -> None:
    """Stands where the copier stands."""


def new_memory(options: argparse.Namespace) -> MemoryManager:
    """Frames for the resident share of the experts and for the requests' KV."""
    page_bytes = PAGE_TOKENS * TOKEN_BYTES
    tokens = PROMPT_TOKENS + options.steps + NUM_WARMUP_STEPS + PAGE_TOKENS
    kv_frames = options.requests * -(-tokens // (PAGE_TOKENS * PAGES_PER_FRAME))
    expert_frames = int(options.layers * options.experts * options.resident / 100)
    geometry = Geometry(
        num_frames=expert_frames + kv_frames,
        frame_bytes=PAGES_PER_FRAME * page_bytes,
        expert_bytes=PAGES_PER_FRAME * page_bytes,
        page_bytes=page_bytes,
        page_tokens=PAGE_TOKENS,
        pages_per_frame=PAGES_PER_FRAME,
        page_rows=96 * PAGE_TOKENS,
    )
    return MemoryManager(
        geometry,
        num_layers=options.layers,
        num_experts=options.experts,
        floor_frames=options.top_k,
        load_experts=no_load,
        policy=MemoryPolicy(options.policy),
    )


def admit_all(memory: MemoryManager, num_requests: int) -> list[str]:
    """Prompts that have nothing in common."""
    rids = [str(number) for number in range(num_requests)]
    for number, rid in enumerate(rids):
        prompt = np.full(PROMPT_TOKENS, number, np.int32).tobytes()
        memory.admit(rid, prompt, "")
        assert memory.extend(rid, PROMPT_TOKENS), "the arena is too small"
        memory.commit(rid, prompt, PROMPT_TOKENS)
    return rids


class Timer:
    """Seconds by part, one row a step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._row: dict[str, float] = {}

    def add(self, part: str, seconds: float) -> None:
        self._row[part] = self._row.get(part, 0.0) + seconds

    def next_step(self) -> None:
        self.rows.append(self._row)
        self._row = {}


def decode_step(
    memory: MemoryManager,
    rids: Sequence[str],
    num_tokens: int,
    experts: Sequence[np.ndarray],
    timer: Timer,
    device: "Device | None",
) -> None:
    """What the worker asks of memory when every request decodes one token; with `device`, without the host."""
    clock = time.perf_counter
    started = clock()
    for rid in rids:
        memory.extend(rid, num_tokens)
        memory.token_id(rid, num_tokens - 1)
    timer.add("KV of the tokens", clock() - started)
    started = clock()
    memory.begin_step()
    timer.add("beginning", clock() - started)
    if device is None:
        started = clock()
        for layer, wanted in enumerate(experts):
            for _ in memory.waves(layer, wanted):
                pass
        timer.add("experts of the layers", clock() - started)
    else:
        may_go_on = memory.has_pages((rid, num_tokens + 1) for rid in rids)
        device.step(memory, experts, timer, may_go_on=may_go_on)
    started = clock()
    memory.snapshot(0)
    timer.add("snapshot", clock() - started)
    timer.next_step()


class Device:
    """Runs steps in what memory lends it; `num_steps` in what it was lent once."""

    def __init__(self, its: Sizes, num_steps: int):
        self._state = StepState(its, "cpu")
        self._num_steps = num_steps
        self._number = 0  # of the step, among these
        self._sets: FrameSets | None = None  # as they are on the device

    def step(
        self, memory: MemoryManager, experts: Sequence[np.ndarray], timer: Timer, *, may_go_on: bool
    ) -> None:
        clock = time.perf_counter
        if self._sets is None:
            started = clock()
            self._sets = memory.lend(max(map(len, experts)))
            assert self._sets is not None, "too few frames for all that a layer uses"
            timer.add("lending", clock() - started)
            assert self._sets.expert_keys is not None
            self._expert_keys = self._sets.expert_keys
            started = clock()
            self._state.upload(0, self._sets, memory.frame_table, 1)
            timer.add("upload, on a CPU", clock() - started)
        outcome = compute(self._sets, experts)
        self._number = (self._number + 1) % self._num_steps if may_go_on else 0
        goes_on = self._number > 0
        started = clock()
        memory.take_back(outcome, goes_on=goes_on)
        timer.add("taking back", clock() - started)
        self._sets = self._behind(outcome) if goes_on else None

    def _behind(self, sets: FrameSets) -> FrameSets:
        """What was used has the keys of all others again: `StepState.go_on`."""
        keys = np.take_along_axis(self._expert_keys, sets.owners.clip(0).astype(np.intp), axis=1)
        keys = np.where(sets.keys == USED, keys, sets.keys)
        return FrameSets(sets.sizes, sets.frames, sets.owners, keys)


def compute(sets: FrameSets, experts: Sequence[np.ndarray]) -> FrameSets:
    """What the device makes of the sets: `kernels.dispatch`."""
    owners, keys = sets.owners.copy(), sets.keys.copy()
    for layer, wanted in enumerate(experts):
        size = sets.sizes[layer]
        its, its_keys = owners[layer, :size], keys[layer, :size]
        is_used = np.isin(its, wanted)
        missing = wanted[~np.isin(wanted, its)]
        rank = np.where(is_used, USED, np.where(its < 0, -1, its_keys))
        order = np.argsort(rank, kind="stable")
        its[order[: len(missing)]] = missing
        its_keys[is_used] = its_keys[order[: len(missing)]] = USED
    return FrameSets(sets.sizes, sets.frames, owners, keys)


def measure(options: argparse.Namespace) -> list[dict[str, float]]:
    rng = np.random.default_rng(0)
    memory, timer = new_memory(options), Timer()
    its = Sizes(options.layers, options.experts, options.top_k, options.requests)
    device = Device(its, options.follow) if options.lent else None
    popularity = np.arange(1, options.experts + 1) ** -options.skew
    popularity = rng.permuted(np.tile(popularity / popularity.sum(), (options.layers, 1)), axis=1)
    rids = admit_all(memory, options.requests)
    num_assignments = options.requests * options.top_k
    for step in tqdm(range(options.steps + NUM_WARMUP_STEPS), unit="step"):
        experts = [
            np.unique(rng.choice(options.experts, num_assignments, p=popularity[layer]))
            for layer in range(options.layers)
        ]
        misses = memory.snapshot(0).expert_misses
        decode_step(memory, rids, PROMPT_TOKENS + step + 1, experts, timer, device)
        timer.rows[-1]["misses (number)"] = memory.snapshot(0).expert_misses - misses
    return timer.rows[NUM_WARMUP_STEPS:]


def summarize(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Microseconds, and misses: mean, median and 99th percentile."""
    names = dict.fromkeys(part for row in rows for part in row)
    parts = {part: np.array([row.get(part, 0.0) for row in rows]) * 1e6 for part in names}
    misses = parts.pop("misses (number)") / 1e6
    parts["all"] = np.sum([*parts.values()], axis=0)
    parts["misses (number)"] = misses
    return {
        part: {
            "mean": round(float(np.mean(its)), 1),
            "median": round(float(np.median(its)), 1),
            "p99": round(float(np.quantile(its, 0.99)), 1),
        }
        for part, its in parts.items()
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--resident", type=lambda text: float(text.rstrip("%")), default=100.0)
    parser.add_argument("--skew", type=float, default=0.0)
    parser.add_argument("--lent", action="store_true")
    parser.add_argument("--follow", type=int, default=1)
    parser.add_argument("--policy", default=MemoryPolicy.COST_AWARE.value)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--profile", type=Path, help="text file for where the time goes")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    figures = summarize(measure(options))
    for part, its in figures.items():
        unit = "" if "number" in part else " us"
        shown = "   ".join(f"{name} {value:8.1f}{unit}" for name, value in its.items())
        print(f"{part:24s} {shown}")
    if options.profile is not None:
        profile = cProfile.Profile()
        profile.runcall(measure, options)
        with options.profile.open("w") as file:
            pstats.Stats(profile, stream=file).strip_dirs().sort_stats("tottime").print_stats(25)
    if options.output is not None:
        report = describe_run() | {"microseconds_per_step": figures}
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
