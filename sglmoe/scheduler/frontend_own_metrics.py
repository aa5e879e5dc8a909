"""Our Prometheus metrics, `sglmoe_*`: the worker's memory, what steps cost, and what the scheduler made of that.

One of the files that know SGLang, as its labels and its storage are SGLang's.
"""

from typing import Any

import msgspec

from sglmoe.scheduler.passes import full_tokens
from sglmoe.scheduler.planner import Planner
from sglmoe.scheduler.report import Restarts, StepReport

GAUGES = {
    "sglmoe_free_frames": ("Frames that hold nothing.", "free_frames"),
    "sglmoe_expert_frames": ("Frames that hold an expert.", "expert_frames"),
    "sglmoe_kv_frames": ("Frames that hold KV pages.", "kv_frames"),
    "sglmoe_locked_pages": ("KV pages of running requests.", "locked_pages"),
    "sglmoe_cached_pages": ("KV pages of cached prefixes.", "cached_pages"),
    "sglmoe_host_blocks": ("Blocks of host memory, of one expert each.", "host_blocks"),
    "sglmoe_host_blocks_filled": ("Those that hold an expert.", "host_blocks_filled"),
    "sglmoe_packed_frames": ("Frames that packed experts are in.", "packed_frames"),
    "sglmoe_packed_experts": ("Experts that are packed in frames.", "packed_experts"),
    "sglmoe_free_pages": ("KV pages that are free within KV frames: fragmentation.", "free_pages"),
}
PLAN_GAUGES = {
    "sglmoe_target_expert_frames": (
        "Frames that the KV of as many requests as planned leaves to experts.",
        "expert_frames",
    ),
    "sglmoe_predicted_step_seconds": (
        "A decode step of as many requests as planned.",
        "step_seconds",
    ),
    "sglmoe_measured_step_seconds": (
        "Mean of the decode steps before the last plan.",
        "measured_step_seconds",
    ),
}
COST_GAUGES = {
    "sglmoe_pass_stream_seconds": (
        "What a pass over prompts is longer by for the experts it has to load.",
        "stream_seconds",
    ),
    "sglmoe_prompt_token_seconds": ("And for each token of a prompt.", "token_seconds"),
    "sglmoe_decode_seconds": ("A decode step but for its rows.", "decode_seconds"),
    "sglmoe_decode_row_seconds": ("And for each request that decodes.", "row_seconds"),
}
PREFETCH_GAUGES = {
    "sglmoe_prefetch_on": ("Whether experts are brought in ahead of their layers.", "is_on"),
    "sglmoe_prefetch_step_ratio": (
        "How long a decode step took in the last trial, as a share of one without prefetching.",
        "step_ratio",
    ),
    "sglmoe_prefetch_saved_seconds": (
        "What demand loads of the prefetched experts used would have taken.",
        "saved_seconds",
    ),
    "sglmoe_prefetch_horizon_layers": ("Layers looked ahead.", "horizon_layers"),
    "sglmoe_prediction_precision": (
        "Of the experts expected in the layer ahead, those that were used.",
        "precision",
    ),
    "sglmoe_prediction_recall": (
        "Of the experts used, those that were expected in the layer ahead.",
        "recall",
    ),
}
COUNTERS = {
    "sglmoe_expert_hits": ("Experts that were resident when needed.", "expert_hits"),
    "sglmoe_expert_misses": ("Experts that had to be loaded when needed.", "expert_misses"),
    "sglmoe_expert_bytes_moved": ("Bytes of experts moved in.", "expert_bytes_moved"),
    "sglmoe_stall_seconds": ("Time that passes waited for experts.", "stall_seconds"),
    "sglmoe_waves": ("Waves of expert computation.", "num_waves"),
    "sglmoe_split_layers": ("Layer passes of more than one wave.", "num_split_layers"),
    "sglmoe_lent_steps": (
        "Decode steps that paged experts in without the host.",
        "lent_steps",
    ),
    "sglmoe_followed_steps": (
        "Of those, the ones behind which another step began before they were over.",
        "followed_steps",
    ),
    "sglmoe_experts_evicted": ("Experts evicted.", "experts_evicted"),
    "sglmoe_pages_evicted": ("Cached KV pages evicted.", "pages_evicted"),
    "sglmoe_ghost_hit_tokens": (
        "Tokens that would have been found cached had they not been evicted.",
        "ghost_hit_tokens",
    ),
    "sglmoe_experts_streamed": (
        "Of prefetches begun, those of passes that use most experts of every layer.",
        "experts_streamed",
    ),
    "sglmoe_prefetches_begun": ("Experts begun to be brought in ahead.", "prefetches_begun"),
    "sglmoe_prefetches_used": ("Those that were there in time, and used.", "prefetches_used"),
    "sglmoe_prefetches_late": ("Those their layer had to wait for.", "prefetches_late"),
    "sglmoe_prefetches_wasted": (
        "Those given up, or evicted before anything used them.",
        "prefetches_wasted",
    ),
    "sglmoe_load_seconds": ("Time that loads on demand took.", "load_seconds"),
    "sglmoe_late_seconds": ("Of the stall, that for late ones.", "late_seconds"),
    "sglmoe_host_hits": ("Missed experts that were in host memory.", "host_hits"),
    "sglmoe_packed_hits": (
        "Missed experts that were packed in frames, and decoded from there.",
        "packed_hits",
    ),
    "sglmoe_packed_kept": ("Missed experts that were kept packed as they came.", "packed_kept"),
    "sglmoe_disk_reads": ("Missed experts that were read from the checkpoint.", "disk_reads"),
    "sglmoe_disk_bytes": ("Bytes of these.", "disk_bytes"),
    "sglmoe_host_promoted": ("Experts read into host memory ahead of need.", "host_promoted"),
    "sglmoe_host_promoted_bytes": ("Bytes of these.", "host_promoted_bytes"),
    "sglmoe_host_evicted": ("Experts evicted from host memory.", "host_evicted"),
}


class OwnMetrics:
    """`sglmoe_*`: the worker's memory. Its counters run from its start; ours grow by their differences."""

    def __init__(self, labels: dict[str, Any]) -> None:
        # Late: prometheus_client picks its storage when it is imported, by PROMETHEUS_MULTIPROC_DIR.
        from prometheus_client import Counter, Gauge

        names = list(labels)

        def gauge(name: str, text: str) -> Any:
            return Gauge(name, text, names, multiprocess_mode="mostrecent").labels(**labels)

        def counter(name: str, text: str) -> Any:
            return Counter(name, text, names).labels(**labels)

        self._gauges = {field: gauge(name, text) for name, (text, field) in GAUGES.items()}
        self._plan_gauges = {
            field: gauge(name, text) for name, (text, field) in PLAN_GAUGES.items()
        }
        self._prefetch_gauges = {
            field: gauge(name, text) for name, (text, field) in PREFETCH_GAUGES.items()
        }
        self._cost_gauges = {
            field: gauge(name, text) for name, (text, field) in COST_GAUGES.items()
        }
        self._full_tokens = gauge(
            "sglmoe_full_pass_tokens", "Tokens of prompts for which a pass is worth its experts."
        )
        self._passes = counter("sglmoe_prefill_passes", "Steps that computed prompts.")
        self._passes_held = counter(
            "sglmoe_held_passes", "Passes over prompts that were waited with for more of them."
        )
        self._held_seconds = counter("sglmoe_held_seconds", "For how long, in all.")
        self._held_before = (0, 0.0)
        self._out_of_turn = counter(
            "sglmoe_out_of_turn", "Requests admitted before earlier ones, for sharing experts."
        )
        self._out_of_turn_before = 0
        self._running_limit = gauge(
            "sglmoe_running_limit", "Requests that may run at once: the flags' limit or the plan's."
        )
        self._counters = {field: counter(name, text) for name, (text, field) in COUNTERS.items()}
        self._seen: dict[str, float] = dict.fromkeys(self._counters, 0)
        self._restarts = counter(
            "sglmoe_worker_restarts", "Workers that took the place of a lost one."
        )
        self._restart_seconds = gauge(
            "sglmoe_worker_restart_seconds",
            "How long the last one took to serve, from the loss on.",
        )

    def worker_replaced(self, restarts: Restarts) -> None:
        self._restarts.inc()
        self._restart_seconds.set(restarts.ready_seconds)

    def update(self, planner: Planner, report: StepReport) -> None:
        """Show the state after a step that the planner has taken in."""
        snapshot = report.snapshot
        self._running_limit.set(planner.running_limit)
        self._update_passes(planner, report)
        for field, plan_gauge in self._plan_gauges.items():
            plan_gauge.set(getattr(snapshot.plan, field))
        for field, prefetch_gauge in self._prefetch_gauges.items():
            prefetch_gauge.set(getattr(snapshot.prefetch, field))
        values = msgspec.structs.asdict(snapshot)
        for field, gauge in self._gauges.items():
            gauge.set(values[field])
        for field, counter in self._counters.items():
            # A new worker counts from nothing again.
            growth = values[field] - self._seen[field]
            counter.inc(growth if growth >= 0 else values[field])
            self._seen[field] = values[field]

    def _update_passes(self, planner: Planner, report: StepReport) -> None:
        costs = report.snapshot.costs
        for field, cost_gauge in self._cost_gauges.items():
            cost_gauge.set(getattr(costs, field))
        self._full_tokens.set(full_tokens(costs))
        if report.prefill_tokens:
            self._passes.inc()
        held = (planner.holding_back.num_passes, planner.holding_back.total_seconds)
        self._passes_held.inc(held[0] - self._held_before[0])
        self._held_seconds.inc(held[1] - self._held_before[1])
        self._held_before = held
        self._out_of_turn.inc(planner.num_out_of_turn - self._out_of_turn_before)
        self._out_of_turn_before = planner.num_out_of_turn
