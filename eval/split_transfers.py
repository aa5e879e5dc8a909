"""What it could bring to move an expert's two tensors apart: the first product of an expert while its second tensor comes.

    python -m eval.split_transfers eval/traces/*.npz --output eval/results/split-transfers.json

FluxMoE (arXiv 2604.02715, section 3.2) has two load streams, one for gate and up, one for down. Here a layer computes the
experts that it has while others come, and all of these once the last one is there. The reference traces' routing through the
product's memory manager says how many a layer has and how many come; time is virtual. Only a layer's experts count, nothing
that is computed beside them, so what is gained here is the most that could be. Links and GPUs are assumed, what a CPU
computes is measured.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from eval.replay import frames_of
from eval.replay_memory import LoadCounter, new_memory
from eval.servers import describe_run
from eval.serving_runs import markdown_table
from sglmoe.config import MemoryPolicy
from sglmoe.prediction.trace import Trace, load_trace

HIDDEN, INNER = 2048, 768  # of Qwen3-30B-A3B, bf16
EXPERT_BYTES = 3 * HIDDEN * INNER * 2
FIRST = 2 / 3  # of the bytes, and of the computing: gate and up
GPU_BYTES, GPU_OPERATIONS = (
    2e12,
    2e14,
)  # a second, assumed: about what an H100 reaches with such experts


class LayerWork(NamedTuple):
    """Of one layer of one step."""

    num_there: int
    num_coming: int
    rows: float  # of each expert


class Machine(NamedTuple):
    """Seconds: an expert on the link, computing one of no rows, and each row of it."""

    name: str
    link: float
    expert: float
    row: float

    def compute(self, rows: float) -> float:
        return self.expert + rows * self.row


class Gains(msgspec.Struct, frozen=True):
    """What layers take, over what they take as it is."""

    trace: str
    frames: str
    tokens: str  # of a step: decoding, or prompts
    machine: str
    link_share: float  # of the time as it is, that a layer waits
    one_by_one: float  # experts computed as they come
    split: float  # and the first product of each before its second tensor is there


def as_it_is(work: LayerWork, link: float, compute: float) -> float:
    there = max(work.num_there * compute, work.num_coming * link)
    return there + work.num_coming * compute


def one_by_one(work: LayerWork, link: float, compute: float) -> float:
    now = work.num_there * compute
    for number in range(1, work.num_coming + 1):
        now = max(now, number * link) + compute
    return now


def split(work: LayerWork, link: float, compute: float) -> float:
    now = work.num_there * compute
    for number in range(work.num_coming):
        now = max(now, (number + FIRST) * link) + FIRST * compute
        now = max(now, (number + 1) * link) + (1 - FIRST) * compute
    return now


def works(trace: Trace, num_frames: int) -> tuple[list[LayerWork], list[LayerWork]]:
    """Of all layers of the steps that decode, and of those that compute prompts."""
    counter = LoadCounter()
    memory = new_memory(trace, num_frames, counter, policy=MemoryPolicy.COST_AWARE)
    tokens = np.diff(trace.step_bounds).tolist()
    decoding: list[LayerWork] = []
    prompts: list[LayerWork] = []
    for num_tokens, step in zip(tokens, trace.experts_by_layer(), strict=True):
        memory.begin_step()
        for layer, experts in enumerate(step):
            before = counter.num_experts
            for _ in memory.waves(layer, experts):
                pass
            coming = counter.num_experts - before
            rows = num_tokens * trace.info.top_k / len(experts)
            kind = decoding if num_tokens <= 64 else prompts
            kind.append(LayerWork(len(experts) - coming, coming, rows))
    return decoding, prompts


def gains(layers: Sequence[LayerWork], machine: Machine) -> tuple[float, float, float]:
    """The waits' share of the time as it is; the time of both others, over that."""
    costs = [(its, machine.link, machine.compute(its.rows)) for its in layers]
    whole = sum(as_it_is(*its) for its in costs)
    computing = sum((its.num_there + its.num_coming) * compute for its, _, compute in costs)
    others = [sum(how(*its) for its in costs) / whole for how in (one_by_one, split)]
    return 1 - computing / whole, others[0], others[1]


def machines() -> list[Machine]:
    """Those to compare: computing is measured on this CPU."""
    import torch
    from torch.nn import functional as F

    from sglmoe.plan.measure import least_by_threads

    count = 16  # more than a cache holds
    weights = [
        (torch.randn(2 * INNER, HIDDEN).bfloat16(), torch.randn(HIDDEN, INNER).bfloat16())
        for _ in range(count)
    ]

    def seconds(num_rows: int) -> float:
        rows = torch.randn(num_rows, HIDDEN).bfloat16()

        def run(number: int) -> torch.Tensor:
            w13, w2 = weights[number % count]
            gate, up = F.linear(rows, w13).chunk(2, dim=-1)
            return F.linear(F.silu(gate) * up, w2)

        return least_by_threads(run)

    one, many = seconds(1), seconds(32)
    cpu = one, max(0.0, many - one) / 31
    row_operations = 2 * 3 * HIDDEN * INNER
    gpu = EXPERT_BYTES / GPU_BYTES, row_operations / GPU_OPERATIONS
    links = {
        "CPU, disk of 0.4 GB/s": 4e8,
        "CPU, disk of 1.5 GB/s": 1.5e9,
        "CPU, page cache": 1.6e10,
    }
    found = [Machine(name, EXPERT_BYTES / rate, *cpu) for name, rate in links.items()]
    return [
        *found,
        Machine("GPU, 25 GB/s", EXPERT_BYTES / 2.5e10, *gpu),
        Machine("GPU, 50 GB/s", EXPERT_BYTES / 5e10, *gpu),
    ]


def measure(path: Path, frames: str, found: Sequence[Machine]) -> list[Gains]:
    trace = load_trace(path)
    num_frames = frames_of(frames, trace.info.num_layers * trace.info.num_experts)
    decoding, prompts = works(trace, num_frames)
    return [
        Gains(path.stem, frames, name, its.name, *(round(x, 4) for x in gains(layers, its)))
        for name, layers in (("decoding", decoding), ("prompts", prompts))
        for its in found
        if layers
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--expert-frames", default="50%")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    found = machines()
    rows = [its for path in options.traces for its in measure(path, options.expert_frames, found)]
    head = [*Gains.__struct_fields__]
    print(markdown_table(head, [[f"{getattr(its, name)}" for name in head] for its in rows]))
    if options.output is not None:
        run = describe_run() | {"machines": [its._asdict() for its in found]}
        result = run | {"layers": msgspec.to_builtins(rows)}
        options.output.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
