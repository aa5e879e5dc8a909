"""FluxMoE's comparisons (arXiv 2604.02715, experiments 1 to 4) in virtual time: which memory holds what, and what a step takes.

    python -m eval.fluxmoe [--output FILE.json]

Nothing here ran on a GPU. Systems that bring whole layers are replayed by the paper's protocol, a ring of two layers:
a layer's experts begin to come when the layer two before it has been computed, whatever is routed. Those of sglmoe bring
what is routed, when it is routed, through the product's own frames and values (`eval.packed_memory`); routing is drawn by the
law that `sglmoe.plan` fits to the reference traces. What computing takes is `sglmoe.plan`'s estimate for an assumed GPU. KV
that does not fit makes requests wait.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from eval.packed_memory import PackedMemory
from eval.packed_replay import GPU_LATENCY_SECONDS, Machine, packed_ratio_of_bf16
from eval.servers import describe_run
from sglmoe.memory.arena import Geometry
from sglmoe.memory.packed_share import plan_slab_class
from sglmoe.memory.placement import (
    Backend,
    layer_seconds,
    plan_counts,
    plan_moves,
    plan_placement,
)
from sglmoe.memory.residency import MissCurve
from sglmoe.plan.cost_model import GPU_LAYER_SECONDS, assumed_speeds, costs_of
from sglmoe.plan.model_shape import ModelShape, read_model
from sglmoe.plan.routing import expert_uses, reference_skew

MODELS = Path(__file__).parents[1] / "launch" / "models"
MEMORY_OVERHEAD = Path(__file__).parent / "results" / "memory-overhead-cpu.json"
RESIDENT_RATIO = 7 / 8  # of the layers, in the paper's vLLM-O and FluxMoE-H
RING_LAYERS = 2
# The link is PCIe 4.0 x16 in practice; the decoder is what the paper's figures imply for an L40.
GPU = Machine("GPU, 25 and 250 GB/s", 25e9, 250e9, GPU_LATENCY_SECONDS, GPU_LAYER_SECONDS)
NUM_WARM_STEPS, NUM_STEPS = 64, 16  # the share is planned every 16 steps, in steps of a quarter
CONTEXT_TOKENS = 1024
NUM_CYCLES = 4  # of the ring, the last of which counts
BATCHES = (1, 8, 32, 64, 128, 256)


class Case(NamedTuple):
    """So many requests with so much context each, on a device with so much room for experts and KV."""

    shape: ModelShape
    device_bytes: float
    context_tokens: int
    num_requests: int

    @property
    def layer_bytes(self) -> float:
        return self.shape.num_experts * self.shape.expert_bytes

    @property
    def kv_bytes(self) -> float:
        """Of a request."""
        return self.shape.token_bytes * self.context_tokens

    @property
    def ring_bytes(self) -> float:
        return RING_LAYERS * self.layer_bytes

    def running(self, expert_bytes: float) -> int:
        """Requests whose KV fits beside so many bytes of experts."""
        return max(
            0, min(self.num_requests, int((self.device_bytes - expert_bytes) / self.kv_bytes))
        )

    def compute_seconds(self, num_running: int) -> float:
        """Of a step, all experts at hand."""
        costs = costs_of(self.shape, assumed_speeds("cuda"), request_tokens=self.context_tokens)
        num_used = float(use_probability(self.shape, num_running).sum())
        return costs.model(num_running, num_used, 1.0).compute_seconds(num_running)


class Layers(NamedTuple):
    """How a system that brings whole layers holds them: the seconds to bring each."""

    seconds: list[float]
    num_running: int


def use_probability(shape: ModelShape, num_running: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How likely a step of so many requests uses each expert of a layer."""
    uses = expert_uses(1, shape.num_experts, shape.top_k, reference_skew(num_running))
    return np.asarray(MissCurve(uses).used(num_running), np.float64)


def ring_seconds(compute: Sequence[float], load: Sequence[float]) -> float:
    """Of a step, once the ring turns: layer i is computed when it is there, and comes when layer i - 2 is computed.

    The paper's Algorithm 1, over the ends of steps; what is brought comes one layer after the other.
    """
    computed = [0.0] * RING_LAYERS  # ends of the last layers
    link, began = 0.0, 0.0
    for _ in range(NUM_CYCLES):
        began = computed[-1]
        for layer, seconds in enumerate(load):
            link = max(link, computed[-RING_LAYERS]) + seconds
            computed.append(max(computed[-1], link) + compute[layer])
    return computed[-1] - began


# ---------------------------------------------------------------------------------- whole layers


def all_resident(case: Case) -> Layers:
    """vLLM."""
    num_layers = case.shape.num_layers
    return Layers([0.0] * num_layers, case.running(num_layers * case.layer_bytes))


def resident_and_offloaded(case: Case) -> Layers:
    """vLLM-O: the first layers in memory, the others from the host, one ahead."""
    num_layers = case.shape.num_layers
    num_resident = int(RESIDENT_RATIO * num_layers)
    load = case.layer_bytes / GPU.link_bytes_per_second
    return Layers(
        [0.0] * num_resident + [load] * (num_layers - num_resident),
        case.running(num_resident * case.layer_bytes + case.ring_bytes),
    )


def compressed_and_offloaded(case: Case) -> Layers:
    """FluxMoE-H: the first layers packed in memory, the others from the host."""
    num_layers = case.shape.num_layers
    num_packed = int(RESIDENT_RATIO * num_layers)
    device_bytes = packed_ratio() * num_packed * case.layer_bytes + case.ring_bytes
    decode = case.layer_bytes / GPU.decode_bytes_per_second
    load = case.layer_bytes / GPU.link_bytes_per_second
    seconds = [decode] * num_packed + [load] * (num_layers - num_packed)
    return Layers(seconds, case.running(device_bytes))


def balanced(case: Case) -> Layers:
    """FluxMoE: each layer's experts with the decoder and the link, as fast as both are together."""
    num_running = case.running(case.ring_bytes)
    backends = backends_beside(case, num_running)
    shares = plan_placement(backends, case.layer_bytes)
    seconds = layer_seconds(backends, shares, case.layer_bytes)
    return Layers([seconds] * case.shape.num_layers, num_running)


def unbalanced(case: Case) -> Layers:
    """The same bytes on the host, as whole layers."""
    num_running = case.running(case.ring_bytes)
    num_layers = case.shape.num_layers
    shares = plan_placement(backends_beside(case, num_running), case.layer_bytes)
    num_offloaded = math.ceil(shares[1] * num_layers - 1e-9)
    decode = case.layer_bytes / GPU.decode_bytes_per_second
    load = case.layer_bytes / GPU.link_bytes_per_second
    return Layers([decode] * (num_layers - num_offloaded) + [load] * num_offloaded, num_running)


def backends_beside(case: Case, num_running: int) -> list[Backend]:
    """The decoder, with what room the KV of so many requests leaves, and the link."""
    room = case.device_bytes - case.ring_bytes - num_running * case.kv_bytes
    packed = max(0.0, room) / packed_ratio() / case.shape.num_layers
    return [
        Backend("packed", GPU.decode_bytes_per_second, packed),
        Backend("host", GPU.link_bytes_per_second),
    ]


@cache
def packed_ratio() -> float:
    return packed_ratio_of_bf16()


WHOLE_LAYERS: dict[str, Callable[[Case], Layers]] = {
    "all resident": all_resident,
    "7/8 resident": resident_and_offloaded,
    "7/8 packed (FluxMoE-H)": compressed_and_offloaded,
    "unbalanced": unbalanced,
    "balanced (FluxMoE)": balanced,
}


def tokens_per_second(case: Case, layers: Layers) -> float:
    """0 where not one request fits."""
    if not layers.num_running:
        return 0.0
    num_layers = case.shape.num_layers
    compute = [case.compute_seconds(layers.num_running) / num_layers] * num_layers
    return layers.num_running / ring_seconds(compute, layers.seconds)


# ---------------------------------------------------------------------------------------- sglmoe


def sglmoe_tokens_per_second(case: Case, share: float | None) -> float:
    """What is routed is brought on demand, packed; `share` of the frames, or a planned one, hold packed experts."""
    shape = case.shape
    num_running = case.running(shape.floor_frames * shape.expert_bytes)
    if not num_running:
        return 0.0
    num_frames = int((case.device_bytes - num_running * case.kv_bytes) / shape.expert_bytes)
    costs = GPU.costs(shape.expert_bytes, packed_ratio(), overlap=False)
    memory = PackedMemory(
        (shape.num_layers, shape.num_experts),
        frames_only(min(num_frames, shape.all_experts), shape.expert_bytes),
        floor_frames=shape.floor_frames,
        slab=plan_slab_class(int(packed_ratio() * shape.expert_bytes), shape.expert_bytes),
        costs=costs,
        compute_seconds=case.compute_seconds(num_running),
        share=share,
    )
    stall = 0.0
    for step, layers in enumerate(sampled_steps(shape, num_running)):
        for packed, loaded in memory.run_step(layers).groups:
            if step >= NUM_WARM_STEPS:
                num_groups = bool(packed) + bool(loaded)
                stall += costs.stall_seconds(packed, loaded) + num_groups * GPU.latency_seconds
    return num_running / (case.compute_seconds(num_running) + stall / NUM_STEPS)


def sampled_steps(shape: ModelShape, num_running: int) -> Iterator[list[list[int]]]:
    """The same for every system."""
    rng = np.random.default_rng(num_running)
    probability = use_probability(shape, num_running)
    for _ in range(NUM_WARM_STEPS + NUM_STEPS):
        used = rng.random((shape.num_layers, shape.num_experts)) < probability
        used[:, 0] |= ~used.any(axis=1)
        yield [np.flatnonzero(row).tolist() for row in used]


def frames_only(num_frames: int, expert_bytes: int) -> Geometry:
    return Geometry(
        num_frames=num_frames,
        frame_bytes=expert_bytes,
        expert_bytes=expert_bytes,
        page_bytes=expert_bytes,
        page_tokens=1,
        pages_per_frame=1,
        page_rows=1,
    )


# ----------------------------------------------------------------------------------- experiments


def throughput(
    shape: ModelShape, memory_ratio: float, context_tokens: int
) -> dict[str, list[float]]:
    """Experiments 1 and 2: tokens per second over the batch, by system."""
    rows: dict[str, list[float]] = {
        name: [] for name in (*WHOLE_LAYERS, "sglmoe, ready", "sglmoe, planned")
    }
    for batch in tqdm(BATCHES, f"{shape.architecture}, {memory_ratio:.2f}", unit="batch"):
        device_bytes = memory_ratio * shape.all_expert_bytes
        case = Case(shape, device_bytes, context_tokens, batch)
        for name, system in WHOLE_LAYERS.items():
            rows[name].append(tokens_per_second(case, system(case)))
        rows["sglmoe, ready"].append(sglmoe_tokens_per_second(case, 0.0))
        rows["sglmoe, planned"].append(sglmoe_tokens_per_second(case, None))
    return rows


class Adaptation(NamedTuple):
    """One KV size of experiment 3: tokens per second while experts make room, at their lowest, and after."""

    context_tokens: int
    host_experts: int  # of each layer
    staggered: float  # lowest, one expert of every layer at a time
    concentrated: float  # lowest, the same experts taken layer by layer
    after: float


def adaptation(
    shape: ModelShape, memory_ratio: float, batch: int, contexts: Sequence[int]
) -> list[Adaptation]:
    """Experiment 3: KV grows, and packed experts leave for the host; from the balanced placement of the first context."""
    device_bytes = memory_ratio * shape.all_expert_bytes
    found: list[Adaptation] = []
    counts: list[list[int]] = []
    piled: list[list[int]] = []
    for tokens in contexts:
        case = Case(shape, device_bytes, tokens, batch)
        target = plan_counts(backends_beside(case, batch), shape.num_experts, shape.expert_bytes)
        counts = counts or [[*target] for _ in range(shape.num_layers)]
        piled = piled or [[*target] for _ in range(shape.num_layers)]
        speeds, piled_speeds = [counts_speed(case, counts)], [counts_speed(case, piled)]
        while moves := plan_moves(counts, target):
            for move in moves:
                counts[move.layer][move.source] -= 1
                counts[move.layer][move.target] += 1
            move_as_many(piled, len(moves))
            speeds.append(counts_speed(case, counts))
            piled_speeds.append(counts_speed(case, piled))
        found.append(Adaptation(tokens, target[1], min(speeds), min(piled_speeds), speeds[-1]))
    return found


def move_as_many(piled: list[list[int]], num_moves: int) -> None:
    """Packed experts of the first layer that has any go to the host, then those of the next."""
    for row in piled:
        moved = min(row[0], num_moves)
        row[0] -= moved
        row[1] += moved
        num_moves -= moved


def counts_speed(case: Case, counts: Sequence[Sequence[int]]) -> float:
    expert_bytes = case.shape.expert_bytes
    speeds = (GPU.decode_bytes_per_second, GPU.link_bytes_per_second)
    seconds = [
        max(count * expert_bytes / speed for count, speed in zip(row, speeds, strict=True))
        for row in counts
    ]
    return tokens_per_second(case, Layers(seconds, case.num_requests))


def paging_overhead(shape: ModelShape) -> dict[str, float]:
    """Experiment 4: the manager's own time in a step with everything resident, as measured on a CPU, over a step."""
    measured = json.loads(MEMORY_OVERHEAD.read_text())["microseconds_per_step"]["all"]["median"]
    step = 1e6 * Case(shape, np.inf, 1024, 64).compute_seconds(64)
    return {"manager_microseconds": measured, "step_microseconds": step, "ratio": measured / step}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    config = MODELS / "mixtral-8x7b.json"
    shape = read_model("sizes/mixtral-8x7b", device="cuda", config_file=config).shape
    report: dict[str, Any] = {}
    for experiment, memory_ratio in (("1", 1.15), ("2", 0.95), ("2", 0.5)):
        name = f"{experiment}: memory of {memory_ratio:.0%} of the experts' bytes"
        rows = throughput(shape, memory_ratio, CONTEXT_TOKENS)
        print(f"\n{name}: tokens/s\n\n{table(rows)}")
        report[name] = {
            system: [float(f"{its:.3g}") for its in row] for system, row in rows.items()
        }
    steps = adaptation(shape, 0.95, 64, range(512, 4097, 512))
    print("\n3: " + "\n".join(map(str, steps)))
    report["3: memory of 95%, 64 requests"] = [
        [float(f"{figure:.4g}") for figure in its] for its in steps
    ]
    report["4"] = paging_overhead(shape)
    print(f"\n4: {report['4']}")
    if options.output is not None:
        options.output.write_text(
            json.dumps(describe_run() | {"batches": BATCHES, "experiments": report}) + "\n"
        )


def table(rows: dict[str, list[float]]) -> str:
    lines = [f"| system | {' | '.join(map(str, BATCHES))} |", "|---" * (len(BATCHES) + 1) + "|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {' | '.join(f'{its:.1f}' if its else 'does not fit' for its in row)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
