"""Replay routing traces at equal bytes with experts packed, or not, in the arena and on the link.

    python -m eval.packed_replay eval/traces/*.npz eval/traces/mixed-32.npz@2 [--expert-frames 25%,50%,75%] [--output FILE.json]

TRACE@2 is a trace whose halves run at once, as twice as many requests would.
Compared are frames alone with loads of all bytes, frames alone with packed loads, fixed shares of the arena for packed
experts, and the share that `plan_packed_share` picks every 16 steps. Time is virtual: what a step waits for. Of the
experts of a wave those that were packed are decoded in one go, the others come in one go, one after the other as they
do in the product; `--overlap`: beside each other. The demo model's routing stands for all models; expert sizes are
those of the models named. Speeds of this kind of CPU are those of `eval.codec_speed`; those of GPUs are assumed.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from tqdm import tqdm

from eval.oracle import LayerExperts
from eval.packed_memory import PackedMemory, StepCounts
from eval.replay import describe, frames_of
from eval.servers import describe_run
from sglmoe.memory.packed_share import MAX_RUN_FRAMES, FormCosts, SlabClass, plan_slab_class
from sglmoe.plan.cost_model import CPU_LAYER_SECONDS, GPU_LAYER_SECONDS
from sglmoe.prediction.trace import Trace, load_trace

CODEC_SPEED = Path(__file__).parent / "results" / "codec-speed-cpu.json"
# bf16, three matrices: bytes of an expert.
EXPERT_BYTES = {"Qwen3-30B-A3B": 3 * 2048 * 768 * 2, "Mixtral-8x7B": 3 * 4096 * 14336 * 2}
FIXED_SHARES = (0.25, 0.5, 0.75)
GPU_LATENCY_SECONDS = 10e-6  # assumed: of a launch, or a group of copies


class Machine(msgspec.Struct, frozen=True):
    """Speeds in bf16 bytes a second: of what is loaded as it is, and of what decoding gives."""

    name: str
    link_bytes_per_second: float
    decode_bytes_per_second: float
    latency_seconds: float  # of each group of loads, and of each group of decodings
    layer_seconds: float  # to compute: what a gain is measured by

    def costs(self, expert_bytes: int, packed_ratio: float, *, overlap: bool) -> FormCosts:
        return FormCosts(
            link_seconds=packed_ratio * expert_bytes / self.link_bytes_per_second,
            decode_seconds=expert_bytes / self.decode_bytes_per_second,
            overlap=overlap,
        )


class System(NamedTuple):
    """What is compared."""

    name: str
    share: float | None  # of the frames for packed experts; None: planned
    is_link_packed: bool = True
    keeps_ready: bool = True  # in more waves; see `PackedMemory`


SYSTEMS = (
    System("ready", 0.0, is_link_packed=False, keeps_ready=False),
    System("packed link", 0.0, keeps_ready=False),
    System("more waves", 0.0),
    *(System(f"{share:.0%} packed", share) for share in FIXED_SHARES),
    System("planned", None),
)


class Outcome(msgspec.Struct, frozen=True):
    """A system on a trace, at so many bytes."""

    system: str
    hit_ratio: float
    packed_ratio: float  # of what was used: found packed
    stall_seconds: float  # of a step, mean
    packed_share: float  # of the frames, mean


class Setting(NamedTuple):
    """Whose steps, in how much memory, on what machine, with experts of what size."""

    layers: LayerExperts
    trace: Trace  # for the shape
    num_frames: int
    machine: Machine
    expert_bytes: int
    slab: SlabClass | None
    packed_ratio: float
    overlap: bool


def machines() -> list[Machine]:
    """The first two as measured; the GPUs' decoders are what FluxMoE's figures imply for an L40 (250 GB/s; papers say
    "hundreds"), and what issue 7 aims at; their links are PCIe 4.0 and 5.0 x16 in practice."""
    speed = json.loads(CODEC_SPEED.read_text())["gigabytes_per_second"]
    decode = 1e9 * speed["decode in memory"]
    return [
        Machine(
            "CPU, page cache",
            1e9 * speed["read as they are, page cache"],
            decode,
            0.0,
            CPU_LAYER_SECONDS,
        ),
        Machine("CPU, disk", 1e9 * speed["read as they are, disk"], decode, 0.0, CPU_LAYER_SECONDS),
        Machine("GPU, 25 and 250 GB/s", 25e9, 250e9, GPU_LATENCY_SECONDS, GPU_LAYER_SECONDS),
        Machine("GPU, 50 and 1200 GB/s", 50e9, 1200e9, GPU_LATENCY_SECONDS, GPU_LAYER_SECONDS),
    ]


def packed_ratio_of_bf16() -> float:
    """As measured on Gaussian weights of real shapes."""
    ratios = json.loads(CODEC_SPEED.read_text())["ratios"]
    return float(np.mean([its for name, its in ratios.items() if name.startswith("Gaussian")]))


def replay(setting: Setting, system: System) -> Outcome:
    """All steps; memory begins empty."""
    info = setting.trace.info
    costs = setting.machine.costs(
        setting.expert_bytes, setting.packed_ratio, overlap=setting.overlap
    )
    memory = PackedMemory(
        (info.num_layers, info.num_experts),
        msgspec.structs.replace(info.geometry, num_frames=setting.num_frames),
        floor_frames=info.floor_frames,
        slab=setting.slab,
        costs=costs,
        compute_seconds=info.num_layers * setting.machine.layer_seconds,
        share=system.share,
        keeps_ready=system.keeps_ready,
    )
    steps = [memory.run_step(step) for step in setting.layers]
    return outcome(setting, system, costs, steps)


def outcome(
    setting: Setting, system: System, costs: FormCosts, steps: Sequence[StepCounts]
) -> Outcome:
    groups = np.array([group for step in steps for group in step.groups], np.float64)
    packed, loaded = groups.reshape(-1, 2).T
    if system.is_link_packed:
        seconds = costs.stall_seconds(packed, loaded)
        launches = np.count_nonzero(packed) + np.count_nonzero(loaded)
    else:
        seconds = loaded * setting.expert_bytes / setting.machine.link_bytes_per_second
        launches = np.count_nonzero(loaded)
    hits = sum(step.hits for step in steps)
    used = hits + packed.sum() + loaded.sum()
    stall = float(seconds.sum()) + launches * setting.machine.latency_seconds
    return Outcome(
        system=system.name,
        hit_ratio=float(hits / used),
        packed_ratio=float(packed.sum() / used),
        stall_seconds=stall / len(steps),
        packed_share=float(np.mean([its.packed_frames for its in steps]) / setting.num_frames),
    )


def joined(layers: LayerExperts, num_joined: int) -> LayerExperts:
    """Steps of as many requests: those of `num_joined` parts of the trace at once."""
    num_steps = len(layers) // num_joined
    return [
        [
            sorted(
                {
                    expert
                    for part in range(num_joined)
                    for expert in layers[part * num_steps + step][layer]
                }
            )
            for layer in range(len(layers[0]))
        ]
        for step in range(num_steps)
    ]


# ------------------------------------------------------------------------------------ command line


def settings(
    options: argparse.Namespace, trace: Trace, layers: LayerExperts
) -> Iterator[tuple[list[str], Setting]]:
    """Each with its name: bytes, machine."""
    ratio = packed_ratio_of_bf16()
    num_experts = trace.info.num_layers * trace.info.num_experts
    expert_bytes = EXPERT_BYTES[options.expert_size]
    slab = plan_slab_class(int(ratio * expert_bytes), expert_bytes, max_frames=options.run_frames)
    for frames in options.expert_frames.split(","):
        for machine in machines():
            num_frames = frames_of(frames, num_experts)
            yield (
                [frames, machine.name],
                Setting(
                    layers, trace, num_frames, machine, expert_bytes, slab, ratio, options.overlap
                ),
            )


def table(rows: Sequence[tuple[list[str], list[Outcome]]]) -> str:
    """Stalls of a step in ms, and in brackets over the packed link's."""
    names = [system.name for system in SYSTEMS]
    lines = [
        f"| bytes | machine | {' | '.join(names)} | planned share |",
        "|---" * (len(names) + 3) + "|",
    ]
    for (frames, machine), outcomes in rows:
        beside = outcomes[1].stall_seconds
        cells = [
            f"{1000 * its.stall_seconds:.2f} ({its.stall_seconds / beside:.2f})" for its in outcomes
        ]
        lines.append(
            f"| {frames} | {machine} | {' | '.join(cells)} | {outcomes[-1].packed_share:.0%} |"
        )
    return "\n".join(lines)


def hit_table(rows: Sequence[tuple[list[str], list[Outcome]]]) -> str:
    """Of what was used, in % : found in frames + found packed."""
    names = [system.name for system in SYSTEMS[1:]]
    lines = [f"| bytes | machine | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for (frames, machine), outcomes in rows:
        cells = [f"{its.hit_ratio:.0%} + {its.packed_ratio:.0%}" for its in outcomes[1:]]
        lines.append(f"| {frames} | {machine} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compact(rows: Sequence[tuple[list[str], list[Outcome]]]) -> dict[str, dict[str, list[float]]]:
    """By machine and bytes: stalls in ms by system; the planned share, and what is found in frames and packed with it."""
    found: dict[str, dict[str, list[float]]] = {}
    for (frames, machine), outcomes in rows:
        planned = outcomes[-1]
        figures = [1000 * its.stall_seconds for its in outcomes]
        figures += [planned.packed_share, planned.hit_ratio, planned.packed_ratio]
        found.setdefault(machine, {})[frames] = [float(f"{its:.3g}") for its in figures]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", help="files, or FILE@N")
    parser.add_argument("--expert-frames", default="25%,50%,75%")
    parser.add_argument("--expert-size", default="Qwen3-30B-A3B", choices=EXPERT_BYTES)
    parser.add_argument("--overlap", action="store_true", help="decode beside the link")
    parser.add_argument("--run-frames", type=int, default=MAX_RUN_FRAMES, help="in a run, at most")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    report: dict[str, dict[str, dict[str, list[float]]]] = {}
    for text in options.traces:
        path, _, num_joined = text.partition("@")
        trace = load_trace(Path(path))
        layers = joined(trace.experts_by_layer(), int(num_joined or 1))
        work = [*settings(options, trace, layers)]
        rows = [
            (names, [replay(setting, system) for system in SYSTEMS])
            for names, setting in tqdm(work, Path(text).stem, unit="setting")
        ]
        print(f"\n{describe(Path(text), trace)}\n\n{table(rows)}\n\n{hit_table(rows)}")
        report[Path(text).name.replace(".npz", "")] = compact(rows)
    if options.output is not None:
        columns = [
            *(its.name for its in SYSTEMS),
            "planned share",
            "in frames",
            "packed",
        ]
        options.output.write_text(
            json.dumps(describe_run() | {"columns": columns, "traces": report}) + "\n"
        )


if __name__ == "__main__":
    main()
