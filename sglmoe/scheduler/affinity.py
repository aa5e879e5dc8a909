"""Who of those that wait is next: whose prompt is most like those of the requests that run. Pure functions.

Which experts a token takes hangs on the token itself more than on anything else, so requests that share words share experts,
and a batch of them loads fewer (`eval.affinity_replay`). It needs no routing, and nothing of the worker.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Sketch: TypeAlias = npt.NDArray[np.uint64]  # [SKETCH_BITS / 64]: which token ids a prompt has

# Arbitrary: token ids share a bit where they are equal modulo this. A power of two, as padding is none then.
SKETCH_BITS = 4096
# Arbitrary: so many of the first in the queue are considered for a place ...
NUM_CONSIDERED = 16
# ... and nobody is overtaken more often.
MOST_OVERTAKEN = 16


class Waiting(NamedTuple):
    """A request in the queue."""

    sketch: Sketch
    num_overtaken: int  # later ones that were admitted before it


def sketch_of(token_ids: Iterable[int]) -> Sketch:
    bits = np.zeros(SKETCH_BITS, np.bool_)
    bits[np.fromiter(token_ids, np.int64) % SKETCH_BITS] = True
    return np.packbits(bits).view(np.uint64)


def admission_order(
    waiting: Sequence[Waiting], running: Sequence[Sketch], *, num_places: int
) -> list[int]:
    """`waiting`, most senior first, as the indices of those to admit first.

    For each place the one that is most like those who run by then; of equals, and when nobody runs, the most senior. Nobody
    is put behind more than MOST_OVERTAKEN later ones. Those beyond `num_places` follow by seniority.
    """
    left = list(range(len(waiting)))
    overtaken = [its.num_overtaken for its in waiting]
    company, candidates = Crowd(running), Crowd([its.sketch for its in waiting])
    likeness = [float(company.likeness(its.sketch).sum()) for its in waiting]
    order: list[int] = []
    while left and len(order) < num_places:
        considered = _until_bound(left[:NUM_CONSIDERED], overtaken)
        chosen = max(considered, key=lambda index: (likeness[index], -index))
        for index in left[: left.index(chosen)]:
            overtaken[index] += 1
        left.remove(chosen)
        order.append(chosen)
        if left and len(order) < num_places:
            more = candidates.likeness(waiting[chosen].sketch).tolist()
            likeness = [a + b for a, b in zip(likeness, more, strict=True)]
    return order + left


def _until_bound(indices: list[int], overtaken: Sequence[int]) -> list[int]:
    """Up to the first that can't be overtaken any more."""
    for place, index in enumerate(indices):
        if overtaken[index] >= MOST_OVERTAKEN:
            return indices[: place + 1]
    return indices


class Crowd:
    """Requests to compare one with."""

    def __init__(self, sketches: Sequence[Sketch]) -> None:
        self._sketches = np.array(sketches, np.uint64).reshape(len(sketches), SKETCH_BITS // 64)
        self._sizes = count_bits(self._sketches)

    def likeness(self, other: Sketch) -> npt.NDArray[np.float64]:
        """float64 [requests], 0 to 1: tokens that each has in common with `other`, of those that either has (Jaccard)."""
        both = count_bits(self._sketches & other)
        either = self._sizes + count_bits(other) - both
        likeness: npt.NDArray[np.float64] = both / np.maximum(either, 1)
        return likeness


def count_bits(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Over the last axis."""
    counted: npt.NDArray[np.int64] = np.bitwise_count(words).sum(axis=-1, dtype=np.int64)
    return counted
