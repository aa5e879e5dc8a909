"""A state to look at: 2 layers of 4 experts, 8 frames of 1 KiB; and one of a large model."""

import random

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

STATE = LiveState(
    model="/models/tiny-moe/",
    uptime_seconds=754.0,
    worker=WorkerState(
        state="running",
        pid=4711,
        restarts=0,
        failed_requests=0,
        cause="",
        lost_seconds=0.0,
        restart_seconds=0.0,
    ),
    requests=Requests(running=3, queued=2, preparing=1, running_limit=16, paused=False),
    memory=Memory(
        dense_bytes=4096,
        num_frames=8,
        frame_bytes=1024,
        free_frames=1,
        expert_frames=4,
        packed_frames=0,
        kv_frames=3,
        page_tokens=4,
        locked_pages=5,
        cached_pages=2,
        free_pages=1,
        expert_bytes=8192,
        host_blocks=2,
        host_blocks_filled=1,
    ),
    counters=Counters(
        expert_hits=90,
        expert_misses=10,
        experts_evicted=6,
        pages_evicted=0,
        cache_hit_tokens=12,
        prefill_tokens=40,
        prefetches_begun=5,
        prefetches_used=3,
        prefetches_late=1,
        prefetches_wasted=1,
    ),
    prefetch=Prefetch(mode="on", is_on=True, predictor="pregate", precision=0.625, recall=0.5),
    rates=Rates(
        seconds=2.0,
        decode_tokens_per_second=123.4,
        prompt_tokens_per_second=0.0,
        busy_ratio=0.975,
        hit_ratio=0.931,
        stall_ratio=0.042,
        host_ratio=None,
        expert_bytes_per_second=2048.0,
    ),
    map=Map(
        age_seconds=0.01,
        frames="eeelkkc.",
        residency=("rr.h", "ral."),
        heat=("z0i0", "00z0"),
        heat_is="share",
    ),
)


def large_map(num_frames: int, num_layers: int, num_experts: int) -> Map:
    chooser = random.Random(0)
    return Map(
        age_seconds=0.1,
        frames="".join(chooser.choices("ekc.", k=num_frames)),
        residency=tuple("".join(chooser.choices("r.h", k=num_experts)) for _ in range(num_layers)),
        heat=tuple("".join(chooser.choices("0123z", k=num_experts)) for _ in range(num_layers)),
        heat_is="share",
    )
