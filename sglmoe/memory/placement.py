"""Which share of each layer's experts lies with which backend, where layers are brought in whole. Pure.

FluxMoE (arXiv 2604.02715, section 3): all backends of a layer bring their parts at once, so its experts are there when
the slowest has done, which is soonest where all take the same time: ``x_k = B_k / sum(B)``. Added to that: a backend
that has no room for its share gives the rest to the others, and a change is made an expert a layer at a time, so that
no layer's link has more to bring than its neighbours'.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Backend(NamedTuple):
    """Packed experts on the device, host memory, the disk."""

    name: str
    bytes_per_second: float  # as measured, in bytes of ready experts
    layer_bytes: float = math.inf  # of a layer's ready experts, that it has room for


class Move(NamedTuple):
    """One expert of a layer changes hands; backends by their place in the list."""

    layer: int
    source: int
    target: int


def plan_placement(backends: Sequence[Backend], layer_bytes: float) -> tuple[float, ...]:
    """The share of a layer that each backend should have, for the soonest end of all: 1 in sum.

    Raises ValueError where they have no room for a layer between them.
    """
    if sum(its.layer_bytes for its in backends) < layer_bytes:
        raise ValueError(f"{', '.join(its.name for its in backends)} have no room for a layer")
    shares = [0.0] * len(backends)
    open_, rest = [*range(len(backends))], 1.0
    while True:
        bandwidth = sum(backends[k].bytes_per_second for k in open_)
        full = [
            k
            for k in open_
            if rest * backends[k].bytes_per_second / bandwidth * layer_bytes
            > backends[k].layer_bytes
        ]
        for k in full:
            shares[k] = backends[k].layer_bytes / layer_bytes
        if not full:
            break
        open_ = [k for k in open_ if k not in full]
        rest = max(0.0, 1 - sum(shares))
    for k in open_:
        shares[k] = rest * backends[k].bytes_per_second / bandwidth
    return tuple(shares)


def layer_seconds(
    backends: Sequence[Backend], shares: Sequence[float], layer_bytes: float
) -> float:
    """Until the last backend has brought its share."""
    return max(
        share * layer_bytes / its.bytes_per_second
        for its, share in zip(backends, shares, strict=True)
    )


def plan_counts(
    backends: Sequence[Backend], num_experts: int, expert_bytes: float
) -> tuple[int, ...]:
    """The same in whole experts, each given to the backend that would have brought it soonest.

    Raises ValueError as `plan_placement`, and where room is left in parts of experts only.
    """
    counts = [0] * len(backends)
    for _ in range(num_experts):
        fits = [
            k for k, its in enumerate(backends) if (counts[k] + 1) * expert_bytes <= its.layer_bytes
        ]
        if not fits:
            raise ValueError(f"{', '.join(its.name for its in backends)} have no room for a layer")
        soonest = min(fits, key=lambda k: (counts[k] + 1) / backends[k].bytes_per_second)
        counts[soonest] += 1
    return tuple(counts)


def plan_moves(counts: Sequence[Sequence[int]], target: Sequence[int]) -> list[Move]:
    """The next moves towards `target` experts with each backend: one a layer at most; none when all are there.

    `counts`: by layer and backend.
    """
    moves = []
    for layer, present in enumerate(counts):
        beyond = [its - wanted for its, wanted in zip(present, target, strict=True)]
        if any(beyond):
            moves.append(Move(layer, beyond.index(max(beyond)), beyond.index(min(beyond))))
    return moves
