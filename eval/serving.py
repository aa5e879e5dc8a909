"""Serving benchmarks: several systems in alternation, the same requests, medians and ratios.

    python -m eval.serving --model-path MODEL --systems "unmodified,sglmoe@100%,sglmoe@50%" \\
        --concurrency 1,8,32 --output eval/results/serving-NAME

A system is `unmodified` or `sglmoe@BUDGET`, with flags of its own behind a colon, `;` between them:
`unmodified:--cpu-offload-gb=8;--mem-fraction-static=0.3`. A budget in % is that share of the experts
beside the dense weights and the KV cache of `--kv-tokens` tokens; others go to --memory-budget as
they are. To compare at the same device bytes, give the others flags that take as much.

All servers stay up; those that are not measured are stopped (SIGSTOP), because the unmodified
scheduler polls while idle. `--one-at-a-time` starts and stops them instead, where they do not fit
beside each other. `sglang.benchmark.serving` makes the load. Written: every run (`runs.jsonl`), a
report (`report.md`) and plots.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from eval.demo_model.prompts import prompts_by_domain
from eval.parity import memory_budget
from eval.servers import OURS, UNMODIFIED, Server, describe_run, running
from eval.serving_report import write_report

FIGURES = (
    "output_throughput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "median_itl_ms",
    "p99_itl_ms",
    "duration",
    "completed",
)
FIRST_SEED = 100  # of the round that counts first; warm-up rounds are numbered below 0
COUNTERS = ("expert_hits", "expert_misses", "expert_bytes_moved", "stall_seconds")


class System(NamedTuple):
    """What is measured: a name for the report and a command."""

    name: str
    module: str
    flags: list[str]


class Phase(NamedTuple):
    """One call of the benchmark."""

    name: str
    settings: dict[str, Any]


def workload(options: argparse.Namespace, concurrency: int) -> list[Phase]:
    """The phases of a run; each goes on with the cache that the one before has left."""
    num_prompts = options.prompts_per_client * concurrency
    random_ids = {
        "dataset-name": "random-ids",
        "random-input-len": options.input_len,
        "random-output-len": options.output_len,
        "random-range-ratio": 0.5,
        "num-prompts": num_prompts,
    }
    match options.workload:
        case "random":
            return [Phase("random", random_ids)]
        case "text":
            settings = {
                "dataset-name": "custom",
                "dataset-path": options.dataset_path,
                "sharegpt-output-len": options.output_len,
                "num-prompts": num_prompts,
            }
            return [Phase("text", settings)]
        case "shared-prefix":
            groups = max(1, concurrency // 4)
            settings = {
                "dataset-name": "generated-shared-prefix",
                "gsp-num-groups": groups,
                "gsp-prompts-per-group": num_prompts // groups,
                "gsp-system-prompt-len": 4 * options.input_len,
                "gsp-question-len": options.input_len // 4,
                "gsp-output-len": options.output_len,
                "num-prompts": num_prompts,
            }
            return [Phase("shared prefix", settings)]
        case "shifting":
            long = random_ids | {
                "random-input-len": 8 * options.input_len,
                "num-prompts": max(1, num_prompts // 4),
            }
            return [Phase("few long prompts", long), Phase("many short prompts", random_ids)]
    settings = {"dataset-name": options.workload, "num-prompts": num_prompts}
    if options.dataset_path:
        settings["dataset-path"] = options.dataset_path
    return [Phase(options.workload, settings)]


def run_benchmark(server: Server, phase: Phase, options: argparse.Namespace, **more: Any) -> Any:
    """One run of sglang's benchmark, in a fork: it keeps its arguments in globals."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as output:
        settings = phase.settings | more | {"output-file": output.name, "model": options.model_path}
        settings |= {"backend": "sglang", "host": "127.0.0.1", "port": server.port}
        argv = ["serving", *(f"--{name}={value}" for name, value in settings.items())]
        child = multiprocessing.get_context("fork").Process(
            target=benchmark_in_fork, args=([*argv, "--disable-tqdm"],)
        )
        child.start()
        child.join()
        if child.exitcode:
            raise RuntimeError(f"the benchmark failed: {' '.join(argv)}; log: {server.log}")
        result = json.loads(Path(output.name).read_text().splitlines()[-1])
    return {name: result[name] for name in FIGURES}


def benchmark_in_fork(argv: list[str]) -> None:
    from sglang.benchmark.serving import cli_main

    sys.argv = argv
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        cli_main()


def measure(
    server: Server, system: System, options: argparse.Namespace, concurrency: int, number: int
) -> Iterator[dict[str, Any]]:
    """A row of figures for each phase of the workload."""
    server.post("/flush_cache?timeout=30")
    for phase in workload(options, concurrency):
        before = counters(server, system)
        figures = run_benchmark(
            server, phase, options, **{"max-concurrency": concurrency, "seed": FIRST_SEED + number}
        )
        moved = {name: value - before[name] for name, value in counters(server, system).items()}
        yield {
            "system": system.name,
            "phase": phase.name,
            "concurrency": concurrency,
            "round": number,
            "start_seconds": round(server.start_seconds, 1),
            **figures,
            **moved,
        }


def counters(server: Server, system: System) -> dict[str, float]:
    if system.module != OURS:
        return {}
    memory = server.state()["memory"]
    return {name: memory[name] for name in COUNTERS}


def read_systems(options: argparse.Namespace) -> list[System]:
    flags = [f"--model-path={options.model_path}", "--random-seed=0", *options.server_flag]
    specs = options.systems.split(",")
    state = None
    if any("%" in spec.partition(":")[0] for spec in specs):
        with running(OURS, *flags) as server:
            state = server.state()
    systems = []
    for spec in specs:
        name, _, more = spec.partition(":")
        kind, _, budget = name.partition("@")
        own = [flag for flag in more.split(";") if flag]
        if kind not in ("unmodified", "sglmoe"):
            raise SystemExit(f"--systems: {spec!r} is neither unmodified nor sglmoe@BUDGET")
        if budget.endswith("%"):
            budget = memory_budget(budget, state or {}, options.kv_tokens)
        if budget:
            own.append(f"--memory-budget={budget}")
        systems.append(System(spec, OURS if kind == "sglmoe" else UNMODIFIED, [*flags, *own]))
    return systems


@contextmanager
def all_up(systems: list[System]) -> Iterator[dict[str, Server]]:
    """Every server, all of them stopped."""
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for system in systems:
            servers[system.name] = stack.enter_context(running(system.module, *system.flags))
            stack.enter_context(servers[system.name].stopped())
        yield servers


def run_all(systems: list[System], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of all runs: round by round, so that what drifts, drifts for everyone."""
    rounds = [
        (concurrency, number)
        for concurrency in map(int, options.concurrency.split(","))
        for number in range(-options.warmup, options.rounds)
    ]
    if options.one_at_a_time:
        for system in systems:
            with running(system.module, *system.flags) as server:
                for concurrency, number in rounds:
                    rows = list(measure(server, system, options, concurrency, number))
                    yield from (row for row in rows if number >= 0)
        return
    with all_up(systems) as servers:
        for concurrency, number in rounds:
            for system in systems:
                server = servers[system.name]
                with server.awake():
                    rows = list(measure(server, system, options, concurrency, number))
                yield from (row for row in rows if number >= 0)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--systems", default="unmodified,sglmoe@100%,sglmoe@50%,sglmoe@25%")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and report")
    parser.add_argument(
        "--workload",
        default="random",
        help="text (this machine's, in four domains), random (token ids), shared-prefix, shifting, "
        "or a --dataset-name of sglang's benchmark",
    )
    parser.add_argument(
        "--dataset-path", help="for a dataset of the benchmark's: mooncake, custom, ..."
    )
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--prompts-per-client", type=int, default=3)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument(
        "--kv-tokens", type=int, default=8192, help="that a budget in %% has room for"
    )
    parser.add_argument("--one-at-a-time", action="store_true")
    parser.add_argument("--server-flag", action="append", default=[], help="for all servers")
    return parser.parse_args(arguments)


def write_prompts(path: Path) -> str:
    """Text in the form of the benchmark's custom dataset, whose answers only give a length."""
    prompts = [prompt for group in prompts_by_domain(96).values() for prompt in group]
    turns = [[{"content": prompt}, {"content": "an answer"}] for prompt in prompts]
    path.write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns))
    return str(path)


def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.workload == "text":
        options.dataset_path = write_prompts(Path(tempfile.mkdtemp()) / "prompts.jsonl")
    systems = read_systems(options)
    import sglang.benchmark.serving  # noqa: F401 - once, before the forks

    run = describe_run() | {"systems": {system.name: system.flags for system in systems}}
    with (options.output / "runs.jsonl").open("w") as file:
        file.write(json.dumps(run).replace(str(Path.home()), "~") + "\n")
        for row in run_all(systems, options):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(
                f"{row['system']:24s} {row['phase']:18s} x{row['concurrency']:<3d} "
                f"{row['output_throughput']:8.1f} tokens/s  TTFT {row['median_ttft_ms']:7.1f} ms",
                flush=True,
            )
    print((write_report(options.output)).read_text())


if __name__ == "__main__":
    main()
