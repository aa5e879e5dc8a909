"""Requests that come in bursts, with lengths of a long tail: made up, the same for each seed."""

import random
from typing import NamedTuple


class Arrival(NamedTuple):
    """A request of the trace."""

    at: float  # seconds
    num_prompt: int
    num_output: int


def bursty_trace(num_requests: int, *, per_second: float, seed: int = 0) -> list[Arrival]:
    """Poisson arrivals, for 5 seconds in the mean at 4 times the rate, then for 15 at none or little; long-tailed lengths."""
    rng = random.Random(seed)
    now, burst_ends, quiet_ends = 0.0, 0.0, 0.0
    arrivals: list[Arrival] = []
    while len(arrivals) < num_requests:
        if now >= quiet_ends:
            burst_ends = now + rng.expovariate(1 / 5)
            quiet_ends = burst_ends + rng.expovariate(1 / 15)
        now += rng.expovariate(per_second * (3.7 if now < burst_ends else 0.1))
        num_prompt = min(4000, max(8, int(rng.lognormvariate(5.3, 0.9))))
        arrivals.append(Arrival(now, num_prompt, 1 + min(200, int(rng.expovariate(1 / 16)))))
    return arrivals
