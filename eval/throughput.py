"""All experts resident: is our server as fast as the unmodified one?

    python eval/throughput.py --model-path MODEL --output eval/results/throughput-NAME.json

Starts both servers on this machine, then runs `sglang.benchmark.serving` against them in turn,
A B A B, for each concurrency. The server that is not being measured is stopped (SIGSTOP), so that
it takes no CPU: the unmodified scheduler polls while idle. Prints the ratios ours / theirs and
writes every figure, with machine and command, to the output file.
"""

import argparse
import json
import multiprocessing
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FIGURES = ("output_throughput", "median_itl_ms", "median_ttft_ms")
START_SECONDS = 300.0


class Server:
    """A server in a process group of its own."""

    def __init__(self, module: str, flags: list[str]):
        self.port = free_port()
        self.command = [sys.executable, "-m", module, *flags, "--port", str(self.port)]
        self._log = Path(tempfile.mkdtemp()) / f"{module}.log"
        started = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._wait_until_healthy()
        self.start_seconds = time.perf_counter() - started
        # A fork server's children stay in the group of whoever started it, which is this one.
        self._group = os.getpgid(self._process.pid)

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        tail = self._log.read_text()[-3000:]
        raise RuntimeError(f"{' '.join(self.command)} did not start:\n{tail}")

    @contextmanager
    def alone(self, other: "Server") -> Iterator[None]:
        os.killpg(other._group, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(other._group, signal.SIGCONT)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._group, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_benchmark(
    server: Server, options: argparse.Namespace, concurrency: int, seed: int
) -> dict[str, float]:
    """One run of sglang's benchmark, in a fork: it keeps its arguments in globals."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as output:
        settings = {
            "backend": "sglang",
            "host": "127.0.0.1",
            "port": server.port,
            "model": options.model_path,
            "dataset-name": "random-ids",
            "random-input-len": options.input_len,
            "random-output-len": options.output_len,
            "random-range-ratio": 0.5,
            "num-prompts": options.prompts_per_client * concurrency,
            "max-concurrency": concurrency,
            "seed": seed,
            "output-file": output.name,
        }
        argv = ["serving", *(f"--{name}={value}" for name, value in settings.items())]
        argv += ["--flush-cache", "--disable-tqdm"]
        child = multiprocessing.get_context("fork").Process(target=benchmark_in_fork, args=(argv,))
        child.start()
        child.join()
        if child.exitcode:
            raise RuntimeError(f"the benchmark failed: {' '.join(argv)}")
        result = json.loads(Path(output.name).read_text().splitlines()[-1])
    return {name: float(result[name]) for name in FIGURES}


def benchmark_in_fork(argv: list[str]) -> None:
    from sglang.benchmark.serving import cli_main

    sys.argv = argv
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        cli_main()


def compare(
    ours: Server, theirs: Server, options: argparse.Namespace, concurrency: int
) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for pair in range(-options.warmup, options.pairs):
        for name, server, other in (("ours", ours, theirs), ("theirs", theirs, ours)):
            with server.alone(other):
                figures = run_benchmark(server, options, concurrency, seed=pair + 100)
            if pair >= 0:
                runs[name].append(figures)
    ratios = {
        figure: [a[figure] / b[figure] for a, b in zip(runs["ours"], runs["theirs"], strict=True)]
        for figure in FIGURES
    }
    for figure, values in ratios.items():
        print(
            f"concurrency {concurrency:3d}  {figure:18s} ours/theirs  "
            f"median {statistics.median(values):.3f}  [{min(values):.3f} .. {max(values):.3f}]",
            flush=True,
        )
    return {"concurrency": concurrency, "runs": runs, "ratios": ratios}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--memory-budget", default="2GiB", help="of our server")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="pairs that are not counted")
    parser.add_argument("--prompts-per-client", type=int, default=3)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--server-flag", action="append", default=[], help="for both servers")
    return parser.parse_args()


def describe_machine() -> dict[str, Any]:
    import torch

    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    options = read_options()
    flags = ["--model-path", options.model_path, "--device=cpu", "--random-seed=0"]
    flags += options.server_flag
    ours = Server("sglmoe.launch_server", [*flags, f"--memory-budget={options.memory_budget}"])
    theirs = Server(
        "sglang.launch_server", [*flags, "--max-total-tokens=32768", "--max-running-requests=64"]
    )
    import sglang.benchmark.serving  # noqa: F401 - once, before the forks

    try:
        results = [compare(ours, theirs, options, count) for count in options.concurrency]
    finally:
        ours.stop()
        theirs.stop()
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    report = {
        "machine": describe_machine(),
        "commit": commit,
        "command": " ".join(["python", *sys.argv]).replace(str(Path.home()), "~"),
        "start_seconds": {"ours": ours.start_seconds, "theirs": theirs.start_seconds},
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
