"""What the device makes of frame sets in a step without the host: `kernels.residency.decide`, in plain Python."""

from collections.abc import Sequence, Set
from typing import NamedTuple

import numpy as np

from sglmoe.memory.frame_sets import USED, FrameSets


class PageIn(NamedTuple):
    layer: int
    expert: int
    frame: int


class Outcome(NamedTuple):
    owners: np.ndarray
    keys: np.ndarray
    page_ins: list[PageIn]
    shortfall: int  # experts that found no place


def run_step(sets: FrameSets, routed: Sequence[Set[int]]) -> Outcome:
    """Each layer uses its `routed` experts. A place beyond a set's size is left as garbage."""
    outcome = Outcome(sets.owners.copy(), sets.keys.copy(), [], 0)
    for layer, needed in enumerate(routed):
        size = int(sets.sizes[layer])
        owners, keys = outcome.owners[layer], outcome.keys[layer]
        owners[size:], keys[size:] = 3, USED
        found = [place for place in range(size) if owners[place] in needed]
        free = [place for place in range(size) if owners[place] not in needed]
        free.sort(key=lambda place: (owners[place] >= 0, keys[place] * (owners[place] >= 0), place))
        missing = sorted(needed - {int(owners[place]) for place in found})
        served = list(zip(missing, free, strict=False))
        for expert, place in served:
            owners[place] = expert
            frame = int(sets.frames[layer, place])
            outcome.page_ins.append(PageIn(layer, expert, frame))
        keys[found + [place for _, place in served]] = USED
        outcome = outcome._replace(shortfall=outcome.shortfall + len(missing) - len(served))
    return outcome
