"""What `GET /sglmoe/state` answers, as JSON. `docs/live-view.md` has a table of all fields; a test holds the two together.

Counters run from the start of the worker that serves; None is "nothing to tell", such as a ratio of nothing.
"""

from typing import Literal

import msgspec


class Struct(msgspec.Struct, frozen=True):
    """A part of the answer."""


class WorkerState(Struct, frozen=True):
    """The process that owns the device."""

    state: Literal["running", "restarting"]
    pid: int  # of the last one that served
    restarts: int  # workers that took the place of a lost one
    failed_requests: int  # that workers died of
    cause: str  # why the last one was lost; empty: none was
    lost_seconds: float  # for how long there has been none; 0 while one serves
    restart_seconds: float  # how long the last replacement took, from the loss on


class Requests(Struct, frozen=True):
    """Those that have no answer yet."""

    running: int
    queued: int
    preparing: int  # their grammars are being compiled
    running_limit: int  # that may run at once: the flags' limit or the plan's
    paused: bool  # by /pause_generation


class Memory(Struct, frozen=True):
    """The budget, after the last step."""

    dense_bytes: int  # weights that stay on the device
    num_frames: int
    frame_bytes: int  # of one expert, or of whole KV pages
    free_frames: int
    expert_frames: int
    packed_frames: int  # that packed experts are in
    kv_frames: int
    page_tokens: int
    locked_pages: int  # KV of running requests
    cached_pages: int  # KV of prefixes that nobody uses now
    free_pages: int  # in KV frames, with nothing in them
    expert_bytes: int  # of all experts in the checkpoint
    host_blocks: int  # of one expert each, in host memory
    host_blocks_filled: int


class Rates(Struct, frozen=True):
    """What happened lately."""

    seconds: float  # how long that is
    decode_tokens_per_second: float  # output tokens but first ones
    prompt_tokens_per_second: float  # computed, not found in the cache
    busy_ratio: float  # of the time, in steps
    hit_ratio: float | None  # of experts needed, those that were in a frame
    stall_ratio: float | None  # of the time in steps, waiting for experts
    host_ratio: float | None  # of experts missed, those that were in host memory
    expert_bytes_per_second: float  # moved into frames


class Counters(Struct, frozen=True):
    """Since the start of the worker."""

    expert_hits: int
    expert_misses: int
    experts_evicted: int
    pages_evicted: int
    cache_hit_tokens: int  # of prompts, found in the cache
    prefill_tokens: int  # of prompts, not found there
    prefetches_begun: int
    prefetches_used: int  # were there when their layer asked
    prefetches_late: int  # were on their way
    prefetches_wasted: int  # given up, or evicted before anything used them


class Prefetch(Struct, frozen=True):
    """What is known of predictions."""

    mode: str  # --expert-prefetch
    is_on: bool  # experts are being brought in ahead of their layers
    predictor: str  # empty: none is picked yet
    precision: float | None  # of experts expected in the layer ahead, those that were used
    recall: float | None  # of experts used, those that were expected


class Map(Struct, frozen=True):
    """Who is in which frame, a letter each."""

    age_seconds: float  # since the worker drew it; it does so between two steps
    # [num_frames]: . free, e expert, l expert on its way, p packed experts, k KV of running requests, c cached KV alone
    frames: str
    residency: tuple[
        str, ...
    ]  # by layer with experts, [num_experts]: r in a frame, a there ahead of its first use,
    # l on its way, p packed in a frame, h in host memory alone, . in the checkpoint alone
    heat: tuple[str, ...]  # likewise: digits of base 36; n stands for a share of (n / 35) squared
    heat_is: Literal[
        "share", "rank"
    ]  # of recent steps, those that used it; of all experts, those less in demand


class LiveState(Struct, frozen=True):
    """All of it."""

    model: str  # the name it is served by
    uptime_seconds: float  # since requests are taken
    worker: WorkerState
    requests: Requests
    memory: Memory
    counters: Counters
    prefetch: Prefetch
    rates: Rates | None  # None where the last question was long ago: ask again
    map: Map | None  # None while no worker serves, or the one that does has not drawn one yet
