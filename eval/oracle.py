"""Belady's MIN over a routing trace: the fewest loads that any order of eviction could have had."""

from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import chain

LayerExperts = Sequence[Sequence[Sequence[int]]]  # step, layer -> distinct experts, ascending


def oracle_counts(layers: LayerExperts, num_frames: int) -> tuple[int, int, int]:
    """Hits, misses, and layers with a miss."""
    accesses = [
        [(layer, e) for e in experts] for step in layers for layer, experts in enumerate(step)
    ]
    next_uses = iter(next_uses_of(accesses))
    due: dict[tuple[int, int], int] = {}  # resident -> its next use
    farthest: list[
        tuple[int, tuple[int, int]]
    ] = []  # (-next use, expert), outdated ones among them
    hits = misses = stalls = 0
    for experts in accesses:
        missing = [expert for expert in experts if expert not in due]
        hits += len(experts) - len(missing)
        misses += len(missing)
        stalls += bool(missing)
        if (
            len(experts) <= num_frames
        ):  # all at once: those of this layer, due now, are never farthest
            evict_farthest(due, farthest, num_frames - len(missing))
        for expert in experts:
            use = next(next_uses)
            due[expert] = use
            heappush(farthest, (-use, expert))
        evict_farthest(due, farthest, num_frames)
    return hits, misses, stalls


def evict_farthest(
    due: dict[tuple[int, int], int], farthest: list[tuple[int, tuple[int, int]]], num_kept: int
) -> None:
    while len(due) > num_kept:
        _, expert = heappop(farthest)  # outdated entries are in the past, behind all others
        del due[expert]


def next_uses_of(accesses: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    """For each access in order, when the same expert is accessed next; `len(accesses)` for never."""
    last = len(accesses)
    upcoming: dict[tuple[int, int], int] = {}
    uses: list[list[int]] = []
    for now in range(last - 1, -1, -1):
        uses.append([upcoming.get(expert, last) for expert in accesses[now]])
        upcoming |= dict.fromkeys(accesses[now], now)
    return list(chain.from_iterable(reversed(uses)))
