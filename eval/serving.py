"""Serving benchmarks: several systems in alternation, the same requests, medians and ratios.

    python -m eval.serving --model-path MODEL --systems "unmodified,sglmoe@100%,sglmoe@50%" \\
        --concurrency 1,8,32 --output eval/results/serving-NAME
    python -m eval.serving --model-path MODEL --workload shifting --budgets 50%,70%,90% \\
        --policies cost-aware,static=20%,static=50%,static=80% --output eval/results/shifting-NAME

A system is `unmodified` or `sglmoe@BUDGET`, with flags of its own behind a colon, `;` between them:
`unmodified:--cpu-offload-gb=8;--mem-fraction-static=0.3`, `sglmoe@50%:--memory-policy=static=40%`.
`--budgets` and `--policies` stand for each of our policies under each budget. A budget in % is that
share of the experts beside the dense weights and the KV cache of `--kv-tokens` tokens; others go to
--memory-budget as they are. To compare at the same device bytes, give the others flags that take as much.

All servers stay up (of the shifting workload, those of one budget); those that are not measured are
stopped (SIGSTOP), because the unmodified scheduler polls while idle. `--one-at-a-time` starts and
stops them instead, where they do not fit beside each other. `sglang.benchmark.serving` makes the
load. Written: every run (`runs.jsonl`), a report (`report.md`) and plots.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from eval.memory_timeline import Timeline, read_counters, watched
from eval.parity import memory_budget
from eval.servers import OURS, UNMODIFIED, Server, describe_run, running
from eval.serving_report import write_report
from eval.workloads import Phase, read_workload
from sglmoe.machine import has_accelerator

FIGURES = (
    "output_throughput",
    "total_throughput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "median_itl_ms",
    "p99_itl_ms",
    "duration",
    "completed",
)
FIRST_SEED = 100  # of the round that counts first; warm-up rounds are numbered below 0
POLICY_FLAG, DEFAULT_POLICY = "--memory-policy=", "cost-aware"


class Spec(NamedTuple):
    """One of --systems, as it was written."""

    name: str
    module: str
    budget: str  # empty where none is named
    flags: list[str]

    @property
    def policy(self) -> str:
        """Who gives way in our server, and what else sets it apart; empty for others."""
        if self.module != OURS:
            return ""
        policies = [flag for flag in self.flags if flag.startswith(POLICY_FLAG)]
        others = [flag for flag in self.flags if flag not in policies]
        name = policies[-1].removeprefix(POLICY_FLAG) if policies else DEFAULT_POLICY
        return " ".join([name, *others])


class System(NamedTuple):
    """What is measured, and the flags it is started with."""

    spec: Spec
    flags: list[str]


def run_benchmark(server: Server, phase: Phase, options: argparse.Namespace, **more: Any) -> Any:
    """One run of sglang's benchmark, in a fork: it keeps its arguments in globals."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as output:
        settings = phase.settings | more | {"output-file": output.name, "model": options.model_path}
        settings |= {"backend": "sglang", "host": "127.0.0.1", "port": server.port}
        argv = ["serving", *(f"--{name}={value}" for name, value in settings.items())]
        child = multiprocessing.get_context("fork").Process(
            target=benchmark_in_fork, args=([*argv, "--disable-tqdm"],), daemon=True
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
    server: Server,
    system: System,
    phases: Sequence[Phase],
    options: argparse.Namespace,
    concurrency: int,
    number: int,
) -> Iterator[dict[str, Any]]:
    """A row of figures for each phase of the workload."""
    server.post("/flush_cache?timeout=30")
    started = time.perf_counter()
    settings = {"max-concurrency": concurrency, "seed": FIRST_SEED + number}
    if len(phases) > 1:
        settings["warmup-requests"] = 0  # it would change what the phase before has left
    for phase in phases:
        with observed(server, system, started) as seen:
            figures = run_benchmark(server, phase, options, **settings)
        yield {
            "system": system.spec.name,
            "budget": system.spec.budget,
            "policy": system.spec.policy,
            "phase": phase.name,
            "concurrency": concurrency,
            "round": number,
            "start_seconds": round(server.start_seconds, 1),
            **figures,
            **seen,
        }


@contextmanager
def observed(server: Server, system: System, started: float) -> Iterator[dict[str, Any]]:
    """By how much the counters of our server grew in the block, and its memory meanwhile."""
    seen: dict[str, float | Timeline] = {}
    if system.spec.module != OURS:
        yield seen
        return
    before = read_counters(server.state())
    with watched(server, started) as timeline:
        yield seen
    after = read_counters(server.state())
    seen |= {name: value - before[name] for name, value in after.items()}
    seen["timeline"] = timeline


# -------------------------------------------------------------------------------------------- systems


def read_specs(options: argparse.Namespace) -> list[Spec]:
    """--systems, or every policy at every budget. Raises SystemExit for what is neither."""
    if options.budgets:
        budgets, policies = options.budgets.split(","), options.policies.split(",")
        texts = [f"sglmoe@{b}:{POLICY_FLAG}{p}" for b in budgets for p in policies]
    else:
        texts = options.systems.split(",")
    return [read_spec(text) for text in texts]


def read_spec(text: str) -> Spec:
    name, _, more = text.partition(":")
    kind, _, budget = name.partition("@")
    if kind not in ("unmodified", "sglmoe"):
        raise SystemExit(f"--systems: {text!r} is neither unmodified nor sglmoe@BUDGET")
    flags = [flag for flag in more.split(";") if flag]
    return Spec(text, OURS if kind == "sglmoe" else UNMODIFIED, budget, flags)


def read_systems(options: argparse.Namespace) -> list[System]:
    flags = [f"--model-path={options.model_path}", "--random-seed=0", *options.server_flag]
    specs = read_specs(options)
    state: dict[str, Any] = {}
    if any(spec.budget.endswith("%") for spec in specs):
        with running(OURS, *flags) as server:
            state = server.state()
    systems = []
    for spec in specs:
        budget = spec.budget and memory_budget(spec.budget, state, options.kv_tokens)
        own = [*spec.flags, *([f"--memory-budget={budget}"] if budget else [])]
        systems.append(System(spec, [*flags, *own]))
    return systems


def groups_at_once(systems: list[System], options: argparse.Namespace) -> list[list[System]]:
    """Who is up at the same time: those that are compared."""
    if options.one_at_a_time:
        return [[system] for system in systems]
    if options.workload == "shifting":
        by_budget = groupby(systems, key=lambda system: system.spec.budget)
        return [list(group) for _, group in by_budget]
    return [systems]


@contextmanager
def all_up(systems: list[System]) -> Iterator[dict[str, Server]]:
    """Every server, all of them stopped."""
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for system in systems:
            server = stack.enter_context(running(system.spec.module, *system.flags))
            servers[system.spec.name] = server
            stack.enter_context(server.stopped())
        yield servers


def run_all(
    systems: list[System],
    phases_of: Callable[[int], Sequence[Phase]],
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Rows of all runs: round by round, so that what drifts, drifts for everyone."""
    rounds = [
        (concurrency, number)
        for concurrency in map(int, options.concurrency.split(","))
        for number in range(-options.warmup, options.rounds)
    ]
    for group in groups_at_once(systems, options):
        with all_up(group) as servers:
            for concurrency, number in rounds:
                phases = phases_of(concurrency)
                for system in group:
                    server = servers[system.spec.name]
                    with server.awake():
                        rows = list(measure(server, system, phases, options, concurrency, number))
                    yield from (row for row in rows if number >= 0)


# ------------------------------------------------------------------------------------------------ main


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--systems", default="unmodified,sglmoe@100%,sglmoe@50%,sglmoe@25%")
    parser.add_argument("--budgets", help="of ours, instead of --systems: 50%%,75%%,100%%")
    parser.add_argument("--policies", default=DEFAULT_POLICY, help="at each of --budgets")
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
    parser.add_argument(
        "--concurrency", help="default: 8 if shifting, else 1,8,32 and on a GPU 64 too"
    )
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
    group = parser.add_argument_group("the shifting workload")
    group.add_argument("--prefixes", type=int, default=8, help="common to the long prompts")
    group.add_argument("--prefix-tokens", type=int, default=1024)
    group.add_argument("--questions-per-prefix", type=int, default=4, help="in each long phase")
    group.add_argument("--long-output-len", type=int, default=16)
    group.add_argument("--short-prompts", type=int, default=32, help="--output-len answers them")
    options = parser.parse_args(arguments)
    options.concurrency = options.concurrency or default_concurrency(
        options.workload, has_accelerator=has_accelerator()
    )
    return options


def default_concurrency(workload: str, *, has_accelerator: bool) -> str:
    """A shifting workload is of one size; 64 at a time make a GPU busy and a CPU late."""
    if workload == "shifting":
        return "8"
    return "1,8,32,64" if has_accelerator else "1,8,32"


def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    systems = read_systems(options)
    import sglang.benchmark.serving  # noqa: F401 - once, before the forks

    run = describe_run() | {"systems": {system.spec.name: system.flags for system in systems}}
    with (
        tempfile.TemporaryDirectory() as folder,
        (options.output / "runs.jsonl").open("w") as file,
    ):
        phases_of = read_workload(options, Path(folder))
        file.write(json.dumps(run).replace(str(Path.home()), "~") + "\n")
        for row in run_all(systems, phases_of, options):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(
                f"{row['system']:24s} {row['phase']:18s} x{row['concurrency']:<3d} "
                f"{row['total_throughput']:8.1f} tokens/s in and out, {row['output_throughput']:8.1f} out  "
                f"TTFT {row['median_ttft_ms']:7.1f} ms",
                flush=True,
            )
    print((write_report(options.output)).read_text())


if __name__ == "__main__":
    main()
