"""What our server's memory holds and does while a benchmark runs, twice a second.

`/server_info` is answered from the scheduler's last snapshot: the worker is not asked. The other
processes take 20 ms of a core for an answer, most of it for the 40 KB of flags in it.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eval.servers import Server

PERIOD_SECONDS = 0.5  # 2 % of two cores: see above

# What is kept of each sample, beside its time: counters of the server's memory and of its scheduler.
COUNTERS = (
    "expert_hits",
    "expert_misses",
    "packed_hits",
    "expert_bytes_moved",
    "stall_seconds",
    "experts_evicted",
    "pages_evicted",
    "cache_hit_tokens",
    "prefill_tokens",
    "decoded_tokens",
    "rejected_requests",
    "preempted_requests",
)
FRAMES = ("expert_frames", "packed_frames", "running_kv_frames", "cached_kv_frames", "free_frames")

Timeline = dict[str, list[float]]  # columns, all as long: "seconds", FRAMES and COUNTERS


def read_counters(state: dict[str, Any]) -> dict[str, float]:
    """The `COUNTERS` in what our server says of itself."""
    values = state["memory"] | state["totals"]
    return {name: values[name] for name in COUNTERS}


def frames_by_kind(memory: dict[str, Any]) -> dict[str, float]:
    """All frames by what they hold; those that hold KV are shared out by its pages.

    A frame may have pages of running requests and of cached prefixes, and empty ones.
    """
    pages = memory["locked_pages"] + memory["cached_pages"]
    running_ratio = memory["locked_pages"] / pages if pages else 0.0
    running = memory["kv_frames"] * running_ratio
    return {
        "expert_frames": memory["expert_frames"],
        "packed_frames": memory["packed_frames"],
        "running_kv_frames": round(running, 2),
        "cached_kv_frames": round(memory["kv_frames"] - running, 2),
        "free_frames": memory["free_frames"],
    }


@contextmanager
def watched(server: Server, started: float) -> Iterator[Timeline]:
    """Samples of our server until the block is left; seconds count from `started` (perf_counter)."""
    timeline: Timeline = {name: [] for name in ("seconds", *FRAMES, *COUNTERS)}
    done = threading.Event()

    def sample() -> None:
        state = server.state()
        values = {"seconds": round(time.perf_counter() - started, 3)}
        values |= frames_by_kind(state["memory"]) | read_counters(state)
        for name, column in timeline.items():
            column.append(values[name])

    def run() -> None:
        while not done.wait(PERIOD_SECONDS):
            sample()

    sample()
    thread = threading.Thread(target=run, name="memory-timeline", daemon=True)
    thread.start()
    try:
        yield timeline
    finally:
        done.set()
        thread.join()
    sample()
