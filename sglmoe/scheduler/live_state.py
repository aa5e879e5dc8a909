"""What people see of a running server. Made when somebody asks, and only then is the worker asked."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from socket import socket
from typing import Any

import msgspec

from sglmoe.live_view.state import (
    Counters,
    LiveState,
    Map,
    Memory,
    Prefetch,
    Rates,
    Requests,
    WorkerState,
)
from sglmoe.protocol import MemoryMap, MemorySnapshot, PrefetchReport, ShowMemory
from sglmoe.scheduler.recovery import Recovery
from sglmoe.scheduler.report import Totals
from sglmoe.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Arbitrary: how long a busy worker is waited for; then the map before goes out once more.
DRAWING_SECONDS = 0.1
# Arbitrary: what rates are taken over, at least where somebody has asked so long, and at most.
RATES_SECONDS = (2.0, 10.0)


class Sample(msgspec.Struct, frozen=True):
    """Counts at a time."""

    at: float
    num_restarts: int
    totals: Totals
    snapshot: MemorySnapshot


async def answer(viewers: socket, state: Callable[[], Awaitable[LiveState]]) -> None:
    """A line of JSON for every line that comes in, until the other end is gone."""
    reader, writer = await asyncio.open_unix_connection(sock=viewers)
    try:
        while await reader.readline():
            writer.write(msgspec.json.encode(await state()) + b"\n")
            await writer.drain()
    except Exception:  # ours; nobody but viewers is to miss anything for it
        logger.exception("The live view has failed")
    finally:
        writer.close()


class LiveStates:
    """Makes `LiveState`s. `totals` is counted on by its owner."""

    def __init__(
        self, *, scheduler: Scheduler, totals: Totals, model: str, clock: Callable[[], float]
    ) -> None:
        self._scheduler = scheduler
        self._totals = totals
        self._model = model
        self._clock = clock
        self._started_at = clock()
        self._samples: list[Sample] = []  # the oldest first
        self._drawing: asyncio.Task[None] | None = None
        self._map: MemoryMap | None = None
        self._drawn_at = 0.0

    async def now(self, *, worker_pid: int) -> LiveState:
        """The state as of now; the map may be a little older. Takes `DRAWING_SECONDS` at most."""
        await self._draw()
        scheduler, now = self._scheduler, self._clock()
        planner, roster = scheduler.planner, scheduler.roster
        snapshot = planner.snapshot
        return LiveState(
            model=self._model,
            uptime_seconds=now - self._started_at,
            worker=worker_state(scheduler.recovery, pid=worker_pid),
            requests=Requests(
                running=len(roster.running),
                queued=len(roster.queue),
                preparing=roster.num_preparing,
                running_limit=planner.running_limit,
                paused=scheduler.paused,
            ),
            memory=Memory(
                dense_bytes=scheduler.limits.dense_bytes,
                expert_bytes=scheduler.limits.expert_bytes,
                **fields_of(snapshot, Memory),
            ),
            counters=Counters(**fields_of(snapshot, Counters)),
            prefetch=prefetch_state(snapshot.prefetch),
            rates=self._rates(now),
            map=drawn_map(self._map, age_seconds=now - self._drawn_at),
        )

    async def _draw(self) -> None:
        """Have a new map drawn, unless the last one is still being drawn, and wait for it a little."""
        if self._drawing is None or self._drawing.done():
            self._drawing = asyncio.create_task(self._ask_worker())
        await asyncio.wait({self._drawing}, timeout=DRAWING_SECONDS)

    async def _ask_worker(self) -> None:
        done = await self._scheduler.ask_worker(ShowMemory(-1))
        self._map, self._drawn_at = done.memory, self._clock()

    def _rates(self, now: float) -> Rates | None:
        sample = Sample(
            at=now,
            num_restarts=self._scheduler.recovery.restarts.count,
            totals=msgspec.structs.replace(self._totals),
            snapshot=self._scheduler.planner.snapshot,
        )
        self._samples = recent(self._samples, sample)
        before = self._samples[0]
        self._samples.append(sample)
        return None if before is sample else rates_between(before, sample)


def recent(samples: list[Sample], latest: Sample) -> list[Sample]:
    """Those to take rates from, and `latest` alone where there is none: of the same worker, one of them old enough."""
    least, most = RATES_SECONDS
    kept = [
        sample
        for sample in samples
        if sample.num_restarts == latest.num_restarts and latest.at - sample.at <= most
    ]
    while len(kept) > 1 and latest.at - kept[1].at >= least:
        del kept[0]
    return kept or [latest]


def rates_between(before: Sample, after: Sample) -> Rates | None:
    """What happened between two samples of one worker; None where no time has passed."""
    seconds = after.at - before.at
    if seconds <= 0:
        return None

    def grown(field: str) -> float:
        owner = "totals" if field in Totals.__struct_fields__ else "snapshot"
        return float(getattr(getattr(after, owner), field) - getattr(getattr(before, owner), field))

    hits, misses, step_seconds = grown("expert_hits"), grown("expert_misses"), grown("step_seconds")
    return Rates(
        seconds=seconds,
        decode_tokens_per_second=grown("decoded_tokens") / seconds,
        prompt_tokens_per_second=grown("prompt_tokens") / seconds,
        busy_ratio=min(1.0, step_seconds / seconds),
        hit_ratio=ratio(hits, hits + misses),
        stall_ratio=ratio(grown("stall_seconds"), step_seconds),
        host_ratio=ratio(grown("host_hits"), misses),
        expert_bytes_per_second=grown("expert_bytes_moved") / seconds,
    )


def ratio(part: float, whole: float) -> float | None:
    return min(1.0, part / whole) if whole > 0 else None


def worker_state(recovery: Recovery, *, pid: int) -> WorkerState:
    restarts = recovery.restarts
    return WorkerState(
        state="restarting" if recovery.is_under_way else "running",
        pid=pid,
        restarts=restarts.count,
        failed_requests=restarts.failed_requests,
        cause=restarts.cause,
        lost_seconds=recovery.lost_seconds,
        restart_seconds=restarts.ready_seconds,
    )


def prefetch_state(report: PrefetchReport) -> Prefetch:
    is_known = report.precision > 0 or report.recall > 0
    return Prefetch(
        mode=report.mode,
        is_on=report.is_on,
        predictor=report.predictor,
        precision=report.precision if is_known else None,
        recall=report.recall if is_known else None,
    )


def drawn_map(drawn: MemoryMap | None, *, age_seconds: float) -> Map | None:
    if drawn is None:
        return None
    return Map(age_seconds=age_seconds, **msgspec.structs.asdict(drawn))


def fields_of(snapshot: MemorySnapshot, struct: type[msgspec.Struct]) -> dict[str, Any]:
    """Those of the struct's fields that the snapshot has."""
    shared = set(struct.__struct_fields__) & set(snapshot.__struct_fields__)
    return {name: getattr(snapshot, name) for name in shared}
