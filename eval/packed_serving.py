"""Ready-only and packed experts under the same budget, in live servers: from a slow disk, and from the page cache.

    python -m eval.random_model --dtype bfloat16 --output MODEL && python -m sglmoe.pack --model-path MODEL
    python -m eval.packed_serving --model-path MODEL --output eval/results/packed-serving-cpu.json

For each of --read-rates one server for each of --shares (`--packed-share`); `plain` reads the checkpoint as it is, all others
read packed experts. They have the same --memory-budget and run as many requests as come. Round by round the servers take turns,
each going on with what it has planned; those whose turn it is not are stopped. What is written is medians of rounds, and
ratios to the first share in the same round.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from eval import serving
from eval.memory_timeline import FRAMES, Timeline
from eval.servers import describe_run
from eval.serving_runs import Row, markdown_table, median, round_ratios, shares
from eval.workloads import Phase, all_domains, custom, write_dataset
from sglmoe.memory.read_rate import READ_RATE

PAGE_CACHE = "none"  # no rate: as fast as the page cache
PLAIN = "plain"
LEAST_PROMPTS = 4  # so that one at a time decodes for a while


class Cell(msgspec.Struct, frozen=True):
    """What one server did with so many requests at once: medians of the rounds."""

    read_rate: str
    share: str
    concurrency: int
    tokens_per_second: float  # of the answers
    ratios: list[float]  # to the first share: of each round
    stall_ratios: list[float]  # likewise, of the seconds that steps waited for experts
    hit_percent: float  # experts that were needed, and in a frame
    packed_percent: float  # likewise, decoded from the arena
    stall_percent: float  # of the time
    frames: dict[str, float]  # by kind, the mean over a round
    target_frames: float  # of the plan at the end, for packed experts
    decode_ratio: float  # what decoding takes of what loading takes


def systems_of(options: argparse.Namespace) -> list[serving.System]:
    """A server for each share, and its flags."""
    names = {share: system_name(share, options.budget) for share in options.shares.split(",")}
    arguments = [
        f"--model-path={options.model_path}",
        f"--systems={','.join(names.values())}",
        f"--kv-tokens={options.kv_tokens}",
        # Every batch as large as it is said to be; nothing else that learns.
        "--server-flag=--memory-planner=off",
        "--output=unused",
    ]
    return serving.read_systems(serving.read_options(arguments))


def system_name(share: str, budget: str) -> str:
    flag = "--packed-experts=off" if share == PLAIN else f"--packed-share={share}"
    return f"sglmoe@{budget}:{flag}"


@contextmanager
def read_at(rate: str) -> Iterator[None]:
    """Servers that are started here read experts no faster."""
    if rate != PAGE_CACHE:
        os.environ[READ_RATE] = rate
    try:
        yield
    finally:
        os.environ.pop(READ_RATE, None)


def run_rate(
    rate: str, systems: list[serving.System], prompts: Path, options: argparse.Namespace
) -> Iterator[Cell]:
    """All rounds of all servers; the cells of a concurrency when its rounds are over."""
    names = options.shares.split(",")
    with read_at(rate), serving.all_up(systems) as servers:
        for concurrency in map(int, options.concurrency.split(",")):
            phase = phase_of(concurrency, prompts, options)
            rows: dict[str, list[Row]] = {name: [] for name in names}
            for number in range(-options.warmup, options.rounds):
                for name, system in zip(names, systems, strict=True):
                    server = servers[system.spec.name]
                    with server.awake():
                        (row,) = serving.measure(
                            server, system, [phase], options, concurrency, number
                        )
                        row |= shares(row) | {"packed": server.state()["packed"]}
                    if number >= 0:
                        rows[name].append(row)
            for name in names:
                yield cell(rate, name, concurrency, rows[name], rows[names[0]])


def phase_of(concurrency: int, prompts: Path, options: argparse.Namespace) -> Phase:
    num_prompts = max(concurrency, LEAST_PROMPTS)
    return custom("text", prompts, num_prompts, options.output_len)


def cell(rate: str, share: str, concurrency: int, rows: list[Row], first: list[Row]) -> Cell:
    """`rows` of the rounds, beside those of the first share."""

    def middle(figure: str) -> float:
        return round(median(rows, figure) or 0.0, 1)

    return Cell(
        read_rate=rate,
        share=share,
        concurrency=concurrency,
        tokens_per_second=middle("output_throughput"),
        ratios=rounded(round_ratios(rows, first, "output_throughput")),
        stall_ratios=rounded(round_ratios(rows, first, "stall_seconds")),
        hit_percent=middle("hit_ratio"),
        packed_percent=middle("packed_ratio"),
        stall_percent=middle("stall_share"),
        frames={kind: mean_frames([row["timeline"] for row in rows], kind) for kind in FRAMES},
        target_frames=statistics.median(row["packed"]["target_frames"] for row in rows),
        decode_ratio=rounded([statistics.median(row["packed"]["decode_ratio"] for row in rows)])[0],
    )


def rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]


def mean_frames(timelines: list[Timeline], kind: str) -> float:
    return round(statistics.median(statistics.mean(its[kind]) for its in timelines), 1)


def table(cells: list[Cell]) -> str:
    head = "disk,at once,share,tokens/s,ratio,stall ratio,hits + packed,stalled,frames: experts packed KV,decode / load"
    lines = [
        [
            its.read_rate,
            f"{its.concurrency}",
            its.share,
            f"{its.tokens_per_second:.1f}",
            extremes(its.ratios),
            extremes(its.stall_ratios),
            f"{its.hit_percent:.0f} % + {its.packed_percent:.0f} %",
            f"{its.stall_percent:.0f} %",
            " ".join(f"{number:.0f}" for number in by_tenant(its.frames)),
            f"{its.decode_ratio:.2f}",
        ]
        for its in cells
    ]
    return markdown_table(head.split(","), lines)


def extremes(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f} .. {max(values):.2f}]"


def by_tenant(frames: dict[str, float]) -> list[float]:
    kv = frames["running_kv_frames"] + frames["cached_kv_frames"]
    return [frames["expert_frames"], frames["packed_frames"], kv]


def write(path: Path, run: dict[str, Any], cells: list[Cell]) -> None:
    """A cell a line."""
    lines = ",\n".join(json.dumps(msgspec.to_builtins(its)) for its in cells)
    head = json.dumps(run, indent=1).removesuffix("\n}").replace(str(Path.home()), "~")
    path.write_text(f'{head},\n "cells": [\n{lines}\n]}}\n')


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--budget", default="75%", help="as eval.serving's")
    parser.add_argument("--kv-tokens", type=int, default=2048, help="beside that budget's experts")
    parser.add_argument("--read-rates", default=f"{PAGE_CACHE},200MB", help="bytes a second")
    parser.add_argument("--shares", default="off,50%,auto", help="what each is compared to first")
    parser.add_argument("--concurrency", default="1,4,16,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--prompt-characters", type=int, default=100)
    parser.add_argument("--output-len", type=int, default=32, help="tokens")
    options = parser.parse_args(arguments)
    systems = systems_of(options)
    import sglang.benchmark.serving  # noqa: F401 - once, before the forks

    run = describe_run() | {"flags": {its.spec.name: its.flags for its in systems}}
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "text.jsonl"
        texts = all_domains(4 * 96)
        write_dataset(prompts, [text[: options.prompt_characters] for text in texts])
        for rate in options.read_rates.split(","):
            for its in run_rate(rate, systems, prompts, options):
                cells.append(its)
                write(options.output, run, cells)
                print(f"{its.read_rate} x{its.concurrency} {its.share}: {its}", flush=True)
    print(table(cells))


if __name__ == "__main__":
    main()
