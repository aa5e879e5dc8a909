"""The product's scheduler on a virtual clock: a bursty trace, and a worker that charges for steps what it is told they cost.

    python -m eval.simulated_serving --output eval/results/simulated-serving.json

Passes over prompts pay `stream_seconds` whatever they compute, as where all absent experts have to come. What is compared
is the same trace under other settings: prompts collected or not, decoding in the same pass or not, targets. After every
answer of the worker `violations` is asked whether anything is lost.
"""

import argparse
import asyncio
import json
import statistics
import time
from array import array
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from eval.bursty_trace import Arrival, bursty_trace
from eval.servers import describe_run
from sglmoe.protocol import (
    AddRequests,
    FromWorker,
    Limits,
    MemorySnapshot,
    RowResult,
    StepCosts,
    StepPlan,
    StepResult,
    ToWorker,
    WorkerReady,
)
from sglmoe.scheduler.finish import StopRules
from sglmoe.scheduler.passes import PassSettings
from sglmoe.scheduler.policy import PolicySettings
from sglmoe.scheduler.report import Restarts, StepReport
from sglmoe.scheduler.request import Request, State
from sglmoe.scheduler.roster import Roster
from sglmoe.scheduler.scheduler import Scheduler
from sglmoe.scheduler.settings import SchedulerSettings
from sglmoe.units import ceil_div

PAGE_TOKENS = 16
NUM_COUNTS = sum(field.required for field in msgspec.structs.fields(MemorySnapshot))
NO_MEMORY = msgspec.convert([0] * NUM_COUNTS, MemorySnapshot)
# What steps cost a model of 30 GB on a GPU of 16 GB: 12 GB to load in a pass at 25 GB/s, 8,000 tokens of prompt a second.
STREAMED = StepCosts(
    stream_seconds=0.48, token_seconds=0.000125, decode_seconds=0.06, row_seconds=0.0005
)
RESIDENT = msgspec.structs.replace(STREAMED, stream_seconds=0.0, decode_seconds=0.02)


class Clock:
    """Virtual seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ChargingWorker:
    """Serves rows in order while there are pages; each step takes what `costs` say. Requests of the trace come meanwhile."""

    def __init__(
        self, clock: Clock, costs: StepCosts, arrivals: Sequence[Arrival], *, num_pages: int
    ):
        self.scheduler: Scheduler  # set once it exists
        self.requests: list[Request] = []
        self.num_passes = self.num_steps = self.pass_tokens = 0
        self.busy_seconds = 0.0
        self._clock = clock
        self._costs = costs
        self._coming = deque(arrivals)
        self._num_pages = num_pages
        self._totals: dict[str, int] = {}  # prompt and output tokens of those it knows
        self._computed: dict[str, int] = {}  # of those that hold memory
        self.last_begun = -1  # it never dies
        self._locked_pages = 0
        self._inbox: deque[ToWorker] = deque()

    def send(self, message: ToWorker) -> None:
        self._inbox.append(message)

    def kill(self, cause: str) -> None:
        raise AssertionError(cause)

    async def replace(self, *, silence_seconds: float | None) -> WorkerReady:
        raise AssertionError("nothing kills it")

    async def receive(self) -> FromWorker:
        while True:
            for _ in range(4):  # the scheduler has its turn
                await asyncio.sleep(0)
            if self._inbox:
                message = self._inbox.popleft()
                if isinstance(message, StepPlan):
                    return self._step(message)
                assert isinstance(message, AddRequests)
                for spec in message.requests:
                    self._totals[spec.rid] = len(spec.prompt_ids) // 4 + len(spec.output_ids) // 4
            elif self._coming:
                self._let_come(self._coming[0].at)

    def snapshot(self, step_id: int) -> MemorySnapshot:
        return msgspec.structs.replace(
            NO_MEMORY,
            step_id=step_id,
            total_pages=self._num_pages,
            locked_pages=self._locked_pages,
            page_tokens=PAGE_TOKENS,
            costs=self._costs,
        )

    def _let_come(self, until: float) -> None:
        while self._coming and self._coming[0].at <= until:
            arrival = self._coming.popleft()
            self._clock.now = arrival.at
            request = Request(
                rid=str(len(self.requests)),
                prompt_ids=array("q", [1]) * arrival.num_prompt,
                stop=StopRules(max_new_tokens=arrival.num_output, vocab_size=1 << 30),
            )
            self.requests.append(request)
            self.scheduler.add(request)
        self._clock.now = until

    def _step(self, plan: StepPlan) -> StepResult:
        for rid in plan.drop:
            self._give_back(rid)
            del self._totals[rid]
        for rid in plan.preempt:
            self._give_back(rid)
        rows: list[RowResult] = []
        rejected: list[str] = []
        num_prompt_tokens = 0
        for row in plan.rows:
            total, old = self._totals[row.rid], self._computed.get(row.rid, 0)
            new = min(old + row.num_tokens, total)
            growth = ceil_div(new, PAGE_TOKENS) - ceil_div(old, PAGE_TOKENS)
            if self._locked_pages + growth > self._num_pages:
                self._give_back(row.rid)
                rejected.append(row.rid)
                continue
            self._locked_pages += growth
            self._computed[row.rid] = new
            num_prompt_tokens += new - old if new - old > 1 or old == 0 else 0
            token_id = None
            if new == total:
                token_id, self._totals[row.rid] = total, total + 1
            rows.append(RowResult(row.rid, new, 0, token_id))
        seconds = self._charge(len(rows), num_prompt_tokens)
        self._let_come(self._clock.now + seconds)
        return StepResult(
            plan.step_id,
            tuple(rows),
            tuple(rejected),
            (),
            dict.fromkeys(plan.probe, 0),
            self.snapshot(plan.step_id),
            seconds,
        )

    def _give_back(self, rid: str) -> None:
        self._locked_pages -= ceil_div(self._computed.pop(rid, 0), PAGE_TOKENS)

    def _charge(self, num_rows: int, num_prompt_tokens: int) -> float:
        """In a pass over prompts, a row that decodes is a token more."""
        costs = self._costs
        if not num_rows:
            return 0.0
        self.num_steps += 1
        seconds = costs.decode_seconds + costs.row_seconds * num_rows
        if num_prompt_tokens:
            self.num_passes += 1
            self.pass_tokens += num_prompt_tokens
            compute = costs.token_seconds * (num_prompt_tokens + num_rows)
            stream = costs.stream_seconds
            seconds = max(stream, compute) if costs.loads_overlap else stream + compute
        self.busy_seconds += seconds
        return seconds


class Timeline:
    """Where results go: when tokens came, who ended how, and whether anything is wrong."""

    def __init__(self, clock: Clock) -> None:
        self.scheduler: Scheduler  # set once it exists
        self.ended: list[Request] = []
        self.first_token_seconds: list[float] = []
        self.gaps: list[float] = []  # between tokens
        self._clock = clock
        self._last_at: dict[str, float] = {}
        self._num_seen: dict[str, int] = {}

    async def publish(self, requests: Sequence[Request]) -> None:
        now = self._clock.now
        for request in requests:
            if request.rid in self._last_at:
                self.gaps.append(now - self._last_at[request.rid])
            else:
                self.first_token_seconds.append(now - request.timing.queued_at)
            self._last_at[request.rid] = now
            if request.finished:
                self.ended.append(request)

    async def refuse(self, requests: Sequence[Request]) -> None:
        raise AssertionError(f"refused: {[request.finish for request in requests]}")

    def step_done(self, report: StepReport) -> None:
        assert not (wrong := violations(self.scheduler.roster)), wrong
        assert report.snapshot.locked_pages <= report.snapshot.total_pages

    def worker_replaced(self, ready: WorkerReady, restarts: Restarts) -> None:
        raise AssertionError("nothing kills it")


def violations(roster: Roster) -> list[str]:
    """What must not be: a request in no list or in two, out of order, or in a state that is not its list's."""
    found = []
    if len(roster.queue) + len(roster.running) != len(roster.live):
        found.append("a request is in no list, or in two")
    for name, requests, state in (
        ("queue", roster.queue, State.QUEUED),
        ("running", roster.running, State.RUNNING),
    ):
        if any(request.state is not state for request in requests):
            found.append(f"the {name} holds a request of another state")
        arrivals = [request.arrival for request in requests]
        if arrivals != sorted(arrivals):
            found.append(f"the {name} is out of order")
        if any(roster.live.get(request.rid) is not request for request in requests):
            found.append(f"the {name} holds a request that is not live")
    return found


class Outcome(NamedTuple):
    """What a run came to, for those who want more than figures."""

    requests: list[Request]
    timeline: Timeline
    worker: ChargingWorker
    figures: dict[str, float]


def simulate(
    arrivals: Sequence[Arrival],
    costs: StepCosts,
    policy: PolicySettings,
    *,
    num_pages: int = 20_000,
    new_token_ratio: float = 0.7,
) -> Outcome:
    """Serve the whole trace. Raises AssertionError for whatever must not happen on the way."""
    its = SchedulerSettings(
        policy,
        new_token_ratio=new_token_ratio,
        min_new_token_ratio=min(new_token_ratio, 0.098),
    )
    return asyncio.run(_simulate(arrivals, costs, its, num_pages))


async def _simulate(
    arrivals: Sequence[Arrival], costs: StepCosts, its: SchedulerSettings, num_pages: int
) -> Outcome:
    clock = Clock()
    worker, timeline = (
        ChargingWorker(clock, costs, arrivals, num_pages=num_pages),
        Timeline(clock),
    )
    scheduler = worker.scheduler = timeline.scheduler = Scheduler(
        worker=worker,
        outputs=timeline,
        limits=Limits(
            num_pages * PAGE_TOKENS, PAGE_TOKENS, its.policy.max_running, 1 << 20, 1 << 30
        ),
        snapshot=worker.snapshot(-1),
        settings=its,
        decode=lambda token_ids: "",
        clock=clock,
    )
    started = time.process_time()
    serving = asyncio.create_task(scheduler.run())
    while len(timeline.ended) < len(arrivals):
        if serving.done():
            serving.result()
        await asyncio.sleep(0)
    serving.cancel()
    cpu_seconds = time.process_time() - started
    requests = worker.requests
    figures = summarize(worker, timeline, scheduler, clock.now) | {"cpu_seconds": cpu_seconds}
    return Outcome(requests, timeline, worker, figures)


def summarize(
    worker: ChargingWorker, timeline: Timeline, scheduler: Scheduler, seconds: float
) -> dict[str, float]:
    num_output = sum(request.num_output_tokens for request in timeline.ended)
    num_prompt = sum(len(request.prompt_ids) for request in timeline.ended)
    ttft, gaps = sorted(timeline.first_token_seconds), sorted(timeline.gaps)
    return {
        "seconds": seconds,
        "busy_seconds": worker.busy_seconds,
        "tokens_per_second": (num_prompt + num_output) / seconds,
        "output_tokens_per_busy_second": num_output / worker.busy_seconds,
        "median_ttft_seconds": statistics.median(ttft),
        "p99_ttft_seconds": ttft[int(0.99 * len(ttft))],
        "max_ttft_seconds": ttft[-1],
        "median_itl_seconds": statistics.median(gaps),
        "p99_itl_seconds": gaps[int(0.99 * len(gaps))],
        "num_steps": worker.num_steps,
        "num_passes": worker.num_passes,
        "tokens_per_pass": worker.pass_tokens / worker.num_passes,
        "held_seconds": scheduler.planner.holding_back.total_seconds,
        "num_retractions": sum(request.num_retractions for request in timeline.ended),
    }


# ------------------------------------------------------------------------------------------------ main


def settings(max_running: int, *, mix: bool = False, **passes: Any) -> PolicySettings:
    return PolicySettings(
        max_running=max_running,
        max_prefill_tokens=16384,
        chunk_tokens=2048,
        mix_decode=mix,
        passes=PassSettings(**passes),
    )


def compared(max_running: int) -> dict[str, PolicySettings]:
    return {
        "as SGLang": settings(max_running),
        "as SGLang, mixed": settings(max_running, mix=True),
        "filled": settings(max_running, fill=True),
        "filled, mixed": settings(max_running, mix=True, fill=True),
        "filled, TTFT target 3 s": settings(max_running, fill=True, ttft_seconds=3.0),
        "filled, ITL target 0.7 s": settings(max_running, fill=True, itl_seconds=0.7),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument(
        "--rates", default="3,8", help="requests a second, in the mean of a burst and a lull"
    )
    parser.add_argument("--max-running", type=int, default=64)
    options = parser.parse_args()
    costs = {
        "streamed": STREAMED,
        "streamed, overlapping": msgspec.structs.replace(STREAMED, loads_overlap=True),
        "resident": RESIDENT,
    }
    rows = []
    for rate in map(float, options.rates.split(",")):
        trace = bursty_trace(options.requests, per_second=rate)
        for cost_name, cost in costs.items():
            for name, policy in compared(options.max_running).items():
                if cost is not STREAMED and name not in ("as SGLang", "filled"):
                    continue
                figures = simulate(trace, cost, policy).figures
                rows.append({"costs": cost_name, "rate": rate, "settings": name, **figures})
                print(
                    f"{cost_name:22s} {rate:5.1f}/s {name:26s} {figures['tokens_per_second']:8.0f} tokens/s  "
                    f"TTFT {figures['median_ttft_seconds']:7.2f} s, p99 {figures['p99_ttft_seconds']:7.2f}  "
                    f"ITL {figures['median_itl_seconds']:.3f}, p99 {figures['p99_itl_seconds']:.2f}  "
                    f"{figures['tokens_per_pass']:6.0f} tokens a pass",
                    flush=True,
                )
    shown = [
        {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]
    report = describe_run() | {"costs": {n: msgspec.structs.asdict(c) for n, c in costs.items()}}
    lines = ",\n".join("  " + json.dumps(row) for row in shown)
    options.output.write_text(json.dumps(report)[:-1] + ', "runs": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main()
