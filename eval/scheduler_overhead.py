"""What the scheduler takes of a CPU in each step: its plan alone, and all of its process from a result to the next plan.

    python -m eval.scheduler_overhead --output eval/results/scheduler-overhead.json --profile PROFILE.txt

`--requests` decode together, streamed. The scheduler is the product's, over its own sockets to a worker in another process,
which answers after 5 ms and computes nothing; outputs become SGLang's messages to a detokenizer that reads and forgets them.
Measured is the CPU time of the scheduler's process, ZeroMQ's threads included; then, in another run, how late its event loop
calls back who asks for that every 2 ms: so long does whatever else comes in wait for the scheduler's own work.
"""

import argparse
import asyncio
import contextlib
import cProfile
import io
import json
import multiprocessing
import os
import pstats
import statistics
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq
from sglang.srt.managers.io_struct import sock_send
from sglang.srt.utils.network import get_zmq_socket

from eval.servers import describe_run
from sglmoe.protocol import (
    PROTOCOL_VERSION,
    AddRequests,
    FromWorker,
    Limits,
    MemorySnapshot,
    PrefetchReport,
    RowResult,
    StepPlan,
    StepResult,
    ToWorker,
    WorkerReady,
)
from sglmoe.scheduler.finish import StopRules
from sglmoe.scheduler.frontend_output import build_batch, is_due, take_delta
from sglmoe.scheduler.passes import PassSettings
from sglmoe.scheduler.policy import Candidate, Memory, PolicySettings, plan_step
from sglmoe.scheduler.report import Restarts, StepReport
from sglmoe.scheduler.request import Display, Request
from sglmoe.scheduler.scheduler import Scheduler
from sglmoe.scheduler.settings import SchedulerSettings
from sglmoe.scheduler.worker_client import WorkerProcess
from sglmoe.scheduler.worker_line import WorkerLine
from sglmoe.step_mark import StepMark
from sglmoe.transport import (
    Receiver,
    Sender,
    make_socket_directory,
    plans_address,
    results_address,
)

NUM_PAGES, PAGE_TOKENS, PROMPT_TOKENS = 1_000_000, 16, 1000
WARMUP_STEPS, STEP_SECONDS = 50, 0.005
LAG_SECONDS = 0.002
LIMITS = Limits(NUM_PAGES * PAGE_TOKENS, PAGE_TOKENS, 4096, 1 << 20, 1 << 30)
NUM_COUNTS = sum(field.required for field in msgspec.structs.fields(MemorySnapshot))
SNAPSHOT = msgspec.structs.replace(
    msgspec.convert([0] * NUM_COUNTS, MemorySnapshot),
    total_pages=NUM_PAGES,
    page_tokens=PAGE_TOKENS,
    prefetch=PrefetchReport(recall_by_layer=(0.5,) * 48, coverage=dict.fromkeys("abcde", 0.5)),
)


def run_worker(directory: str, step_mark: StepMark) -> None:
    """Every row gets a token, soon: so late that outputs of one step are out before those of the next."""
    context: zmq.Context[Any] = zmq.Context()
    sender: Sender[FromWorker] = Sender(context, results_address(Path(directory)), bind=False)
    plans: Receiver[ToWorker] = Receiver(
        context, plans_address(Path(directory)), ToWorker, bind=False
    )
    computed: dict[str, int] = {}
    sender.send(WorkerReady(PROTOCOL_VERSION, LIMITS, SNAPSHOT, 0.0, "echoes"))
    while message := plans.receive():
        if isinstance(message, AddRequests):
            computed |= {spec.rid: len(spec.prompt_ids) // 4 - 1 for spec in message.requests}
        elif isinstance(message, StepPlan):
            step_mark.step_id = message.step_id
            for row in message.rows:
                computed[row.rid] += 1
            rows = tuple(RowResult(row.rid, computed[row.rid], 0, 7) for row in message.rows)
            cached = dict.fromkeys(message.probe, 0)
            time.sleep(STEP_SECONDS)
            snapshot = msgspec.structs.replace(SNAPSHOT, step_id=message.step_id)
            sender.send(StepResult(message.step_id, rows, (), (), cached, snapshot, 0.01))
        else:
            return


def run_detokenizer(address: str) -> None:
    socket = zmq.Context().socket(zmq.PULL)
    socket.bind(address)
    while True:
        socket.recv_multipart()


def start_worker() -> WorkerProcess:
    directory, step_mark = make_socket_directory(), StepMark()
    process = multiprocessing.get_context("fork").Process(
        target=run_worker, args=(str(directory), step_mark), daemon=True
    )
    process.start()
    return WorkerProcess(process, directory, step_mark)


class Detokenizer:
    """The outputs of the front end, without its metrics."""

    def __init__(self, address: str) -> None:
        self.num_steps = self.num_messages = 0
        self._socket = get_zmq_socket(zmq.Context.instance(), zmq.PUSH, address, False)

    async def publish(self, requests: Sequence[Request]) -> None:
        due = [r for r in requests if is_due(r, decode=no_text, force_interval=50)]
        deltas = [take_delta(request) for request in due]
        message = build_batch(deltas, weight_version="default", vocab_size=1 << 30, time_stats=None)
        sock_send(self._socket, message)
        self.num_messages += 1

    async def refuse(self, requests: Sequence[Request]) -> None:
        raise AssertionError("nothing is refused")

    def step_done(self, report: StepReport) -> None:
        self.num_steps += 1

    def worker_replaced(self, ready: WorkerReady, restarts: Restarts) -> None:
        raise AssertionError("nothing kills it")


def no_text(token_ids: Sequence[int]) -> str:
    return ""


def new_request(number: int) -> Request:
    return Request(
        rid=f"{number:032x}",  # as long as SGLang's
        prompt_ids=array("q", [1]) * PROMPT_TOKENS,
        stop=StopRules(max_new_tokens=1 << 20, vocab_size=1 << 30, token_ids=frozenset({2})),
        display=Display(stream=True),
    )


async def serve(
    options: argparse.Namespace, address: str, *, profile: cProfile.Profile | None = None
) -> dict[str, float]:
    """What a step costs. With a profile it costs more, and how much is not to be believed."""
    async with serving(options.requests, address) as outputs:
        messages, before = outputs.num_messages, outputs.num_steps
        cpu, wall = time.process_time(), time.perf_counter()
        with profile or contextlib.nullcontext():
            await until(outputs, before + options.steps)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        num_steps = outputs.num_steps - before
        return {
            "cpu_ms_per_step": 1e3 * cpu / num_steps,
            "wall_ms_per_step": 1e3 * wall / num_steps,
            "messages_per_step": (outputs.num_messages - messages) / num_steps,
        }


async def watch_loop(options: argparse.Namespace, address: str) -> dict[str, float]:
    """How late the event loop calls back, in milliseconds. The timer itself is up to one late (epoll)."""
    late: list[float] = []
    loop = asyncio.get_running_loop()
    async with serving(options.requests, address) as outputs:
        last = outputs.num_steps + options.steps
        while outputs.num_steps < last:
            due = loop.time() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            late.append(1e3 * (loop.time() - due))
    return {
        "median_ms": statistics.median(late),
        "p99_ms": percentile(late, 0.99),
        "max_ms": max(late),
    }


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))]


@contextlib.asynccontextmanager
async def serving(num_requests: int, address: str) -> AsyncIterator["Detokenizer"]:
    """All requests decode. Yields where their outputs go."""
    line = WorkerLine(start_worker)
    ready = await line.connect()
    outputs = Detokenizer(address)
    scheduler = Scheduler(
        worker=line,
        outputs=outputs,
        limits=ready.limits,
        snapshot=ready.snapshot,
        settings=SchedulerSettings(policy(), new_token_ratio=0.0, min_new_token_ratio=0.0),
        decode=no_text,
        clock=time.perf_counter,
    )
    for number in range(num_requests):
        scheduler.add(new_request(number))
    async with asyncio.TaskGroup() as group:  # whatever ends the scheduler ends us
        scheduling = group.create_task(scheduler.run())
        await until(outputs, WARMUP_STEPS)
        assert len(scheduler.roster.running) == num_requests
        yield outputs
        scheduling.cancel()
    await line.shut_down()
    line.close()


def policy() -> PolicySettings:
    passes = PassSettings(fill=True, ttft_seconds=1.0, itl_seconds=1.0)
    return PolicySettings(
        max_running=4096, max_prefill_tokens=1 << 20, chunk_tokens=1 << 20, passes=passes
    )


async def until(outputs: "Detokenizer", num_steps: int) -> None:
    while outputs.num_steps < num_steps:
        await asyncio.sleep(0.1)


def write_profile(profile: cProfile.Profile, path: Path) -> None:
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(25)
    path.write_text("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


def time_plan_step(num_requests: int, num_queued: int, repeats: int) -> dict[str, float]:
    """`plan_step` alone, its views made: all decode, and some wait that there is room for."""
    running = [
        Candidate(str(i), PROMPT_TOKENS + 9, PROMPT_TOKENS + 8, 500, PROMPT_TOKENS + 8)
        for i in range(num_requests)
    ]
    queued = [Candidate(f"q{i}", 500, 0, 500) for i in range(num_queued)]
    seconds = []
    for step_id in range(repeats):
        started = time.perf_counter()
        plan_step(
            step_id=step_id,
            running=running,
            queued=queued,
            memory=Memory(NUM_PAGES, PAGE_TOKENS, 0.5),
            settings=policy(),
        )
        seconds.append(time.perf_counter() - started)
    return {
        "median_us": 1e6 * statistics.median(seconds),
        "p99_us": 1e6 * percentile(seconds, 0.99),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--profile", type=Path, help="where functions' times of one more run go")
    options = parser.parse_args()
    found: dict[str, Any] = describe_run() | {"requests": options.requests, "steps": options.steps}
    found["plan_step, all decode"] = time_plan_step(options.requests, 0, 1000)
    found["plan_step, 16 wait"] = time_plan_step(options.requests, 16, 1000)
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/detokenizer"
        reader = multiprocessing.get_context("fork").Process(
            target=run_detokenizer, args=(address,), daemon=True
        )
        reader.start()
        found["scheduler"] = asyncio.run(serve(options, address))
        found["event loop"] = asyncio.run(watch_loop(options, address))
        if options.profile is not None:
            profile = cProfile.Profile()
            asyncio.run(serve(options, address, profile=profile))
            write_profile(profile, options.profile)
        reader.kill()
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    os._exit(0)  # SGLang's threads


if __name__ == "__main__":
    main()
