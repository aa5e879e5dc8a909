"""The log lines, Prometheus metrics and load snapshots that SGLang's scheduler would give, and our own beside them.

One of the files that know SGLang. Metric names are those of `SchedulerMetricsCollector`, and `sglmoe_*`.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.load_snapshot import (
    LoadSnapshot,
    QueueMetrics,
    create_load_snapshot_writer,
)
from sglang.srt.observability.metrics_collector import (
    QueueCount,
    SchedulerMetricsCollector,
    SchedulerStats,
)
from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats
from sglang.srt.runtime_context import get_observability, get_schedule

from sglmoe.protocol import MemorySnapshot
from sglmoe.scheduler.frontend_own_metrics import OwnMetrics
from sglmoe.scheduler.report import Restarts, StepReport, Totals
from sglmoe.scheduler.request import Request
from sglmoe.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Arbitrary: /v1/loads is at most this old.
LOAD_SNAPSHOT_SECONDS = 0.1
# SGLang's GEN_THROUGHPUT_STALENESS_SECONDS.
THROUGHPUT_STALE_SECONDS = 30.0


class Metrics:
    """Turns step reports into what operators look at. `collector` is None without --enable-metrics."""

    def __init__(self, *, server_args: Any, port_args: Any, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.totals = Totals()
        self._loads = create_load_snapshot_writer(port_args, dp_size=1, dp_rank=0)
        self._log_interval = get_observability().decode_log_interval
        self._use_priority = get_schedule().enable_priority_scheduling
        context = SchedulerMetricsCollector.init_new(
            server_args=server_args,
            enable_priority_scheduling=self._use_priority,
            enable_lora=False,
            enable_hierarchical_cache=False,
        )
        self.collector = context.collector
        self._own = OwnMetrics(self.collector.labels) if self.collector else None
        self._stats = SchedulerStats()
        self._num_decode_steps = 0
        self._num_decode_tokens = 0
        self._logged_decode_at = self._logged_prefill_at = time.perf_counter()
        self._loads_written_at = 0.0
        self._gen_throughput = 0.0
        self._emit_constants()

    @property
    def gen_throughput(self) -> float:
        """Output tokens per second over the last log interval; 0 when that is long ago."""
        age = time.perf_counter() - self._logged_decode_at
        return self._gen_throughput if age < THROUGHPUT_STALE_SECONDS else 0.0

    def step_done(self, report: StepReport) -> None:
        """Count a step, and log if it is time to. To be called before the scheduler acts on it."""
        self.totals.count(report)
        if report.prefill_tokens:
            self._on_prefill(report)
        if report.decode_tokens:
            self._on_decode(report)
        if self.collector is not None and report.num_rejected:
            self.collector.increment_retracted_reqs(
                num_retracted_reqs=report.num_rejected,
                num_retracted_input_tokens=report.rejected_input_tokens,
                num_retracted_output_tokens=report.rejected_output_tokens,
            )
        if self._own is not None:
            self._own.update(self._scheduler.planner, report)
        now = time.perf_counter()
        if now - self._loads_written_at > LOAD_SNAPSHOT_SECONDS:
            self.write_loads()

    def worker_replaced(self, restarts: Restarts) -> None:
        if self._own is not None:
            self._own.worker_replaced(restarts)

    def became_idle(self) -> None:
        """Nothing runs or waits any more; the gauges should say so."""
        self.write_loads()
        self._log_stats(self._scheduler.planner.snapshot)

    def write_loads(self) -> None:
        self._loads_written_at = time.perf_counter()
        scheduler, snapshot = self._scheduler, self._scheduler.planner.snapshot
        used = _used_tokens(snapshot)
        waiting = sum(request.num_tokens for request in scheduler.roster.queue)
        self._loads.write(
            LoadSnapshot(
                timestamp=time.time(),
                num_running_reqs=len(scheduler.roster.running),
                num_waiting_reqs=len(scheduler.roster.queue),
                num_waiting_uncached_tokens=waiting,
                num_used_tokens=used,
                num_total_tokens=used + waiting,
                num_active_tokens=used + waiting,
                max_total_num_tokens=scheduler.limits.total_tokens,
                max_running_requests=scheduler.planner.policy.max_running,
                token_usage=round(_token_usage(snapshot), 4),
                gen_throughput=round(self.gen_throughput, 2),
                cache_hit_rate=round(self._stats.cache_hit_rate, 4),
                queues=QueueMetrics(
                    waiting=len(scheduler.roster.queue),
                    grammar=scheduler.roster.num_preparing,
                    paused=0,
                    retracted=0,
                    prealloc_ready=0,
                ),
            )
        )

    def time_stats(self, request: Request) -> SchedulerReqTimeStats:
        """SGLang's record of when things happened to a request; both use time.perf_counter."""
        timing = request.timing
        return SchedulerReqTimeStats(
            has_timing_data=True,
            wait_queue_entry_time=timing.queued_at,
            forward_entry_time=timing.scheduled_at,
            prefill_finished_time=timing.first_token_at,
            completion_time=timing.finished_at,
            queue_duration_s=max(0.0, timing.scheduled_at - timing.queued_at),
        )

    def wants_times(self, requests: Sequence[Request]) -> bool:
        """Whether a message on these requests should carry their times: at their beginnings and ends."""
        if self.collector is None:
            return False
        return any(request.finished or not request.sent.started for request in requests)

    def first_output(self, request: Request) -> None:
        """A request's first tokens go out."""
        if self.collector is not None:
            waited = request.timing.scheduled_at - request.timing.queued_at
            self.collector.observe_queue_time(waited)

    def _on_prefill(self, report: StepReport) -> None:
        now = time.perf_counter()
        gap = max(now - self._logged_prefill_at, 1e-9)
        self._logged_prefill_at = now
        total = report.prefill_tokens + report.cached_tokens
        self._stats.cache_hit_rate = report.cached_tokens / total
        logger.info(
            "Prefill batch, #new-seq: %d, #new-token: %d, #cached-token: %d, token usage: %.2f, "
            "#running-req: %d, #queue-req: %d, input throughput (token/s): %.2f",
            report.num_admitted,
            report.prefill_tokens,
            report.cached_tokens,
            _token_usage(report.snapshot),
            len(self._scheduler.roster.running),
            len(self._scheduler.roster.queue),
            report.prefill_tokens / gap,
        )
        if self.collector is not None:
            self.collector.increment_realtime_tokens(
                None,
                prefill_compute_tokens=report.prefill_tokens,
                prefill_cache_tokens=report.cached_tokens,
            )
            self.collector.increment_effective_prefill_tokens(
                input_tokens=report.prefill_tokens,
                device_hit_tokens=report.cached_tokens,
                host_hit_tokens=0,
                storage_hit_tokens=0,
            )
            self._log_stats(report.snapshot)

    def _on_decode(self, report: StepReport) -> None:
        self._num_decode_steps += 1
        self._num_decode_tokens += report.decode_tokens
        if self.collector is not None:
            self.collector.increment_realtime_tokens(None, decode_tokens=report.decode_tokens)
        if self._num_decode_steps % self._log_interval:
            return
        now = time.perf_counter()
        self._gen_throughput = self._num_decode_tokens / max(now - self._logged_decode_at, 1e-9)
        self._logged_decode_at, self._num_decode_tokens = now, 0
        snapshot = report.snapshot
        lookups = max(1, snapshot.expert_hits + snapshot.expert_misses)
        logger.info(
            "Decode batch, #running-req: %d, #token: %d, token usage: %.2f, expert hit rate: %.3f, "
            "gen throughput (token/s): %.2f, #queue-req: %d",
            len(self._scheduler.roster.running),
            _used_tokens(snapshot),
            _token_usage(snapshot),
            snapshot.expert_hits / lookups,
            self._gen_throughput,
            len(self._scheduler.roster.queue),
        )
        self._log_stats(snapshot)

    def _log_stats(self, snapshot: MemorySnapshot) -> None:
        if self.collector is None:
            return
        roster, stats = self._scheduler.roster, self._stats
        free_pages = snapshot.available_pages - snapshot.cached_pages
        stats.num_running_reqs = self._count(roster.running)
        stats.num_queue_reqs = self._count(roster.queue)
        stats.num_grammar_queue_reqs = roster.num_preparing
        stats.gen_throughput = self.gen_throughput
        stats.decode_sum_seq_lens = sum(request.num_tokens for request in roster.running)
        stats.num_used_tokens = stats.kv_used_tokens = _used_tokens(snapshot)
        stats.token_usage = round(_token_usage(snapshot), 2)
        stats.full_token_usage = _token_usage(snapshot)
        stats.kv_available_tokens = max(0, free_pages) * snapshot.page_tokens
        stats.kv_evictable_tokens = snapshot.cached_pages * snapshot.page_tokens
        stats.new_token_ratio = self._scheduler.planner.ratio.current
        self.collector.log_stats(stats)

    def _count(self, requests: Sequence[Request]) -> QueueCount:
        by_priority = (
            dict(Counter(request.priority for request in requests)) if self._use_priority else None
        )
        return QueueCount(total=len(requests), by_priority=by_priority)

    def _emit_constants(self) -> None:
        if self.collector is None:
            return
        snapshot, limits = self._scheduler.planner.snapshot, self._scheduler.limits
        self.collector.emit_constants(
            max_total_num_tokens=limits.total_tokens,
            max_total_num_tokens_swa=None,
            weight_memory_usage_gb=0.0,
            kv_cache_memory_usage_gb=snapshot.num_frames * snapshot.frame_bytes / 2**30,
            graph_memory_usage_gb={},
            max_running_requests_under_SLO=None,
            page_size=limits.page_tokens,
            num_pages=snapshot.total_pages,
            context_len=limits.context_tokens,
            startup_available_gpu_memory_gb=0.0,
        )


def _used_tokens(snapshot: MemorySnapshot) -> int:
    return snapshot.locked_pages * snapshot.page_tokens


def _token_usage(snapshot: MemorySnapshot) -> float:
    return snapshot.locked_pages / max(1, snapshot.total_pages)
