"""What the device makes of frame sets in a step without the host: `mailbox.commit` and `dispatch.dispatch`, in Python."""

from collections.abc import Sequence, Set
from typing import NamedTuple

from sglmoe.memory.experts import ABSENT, Load
from sglmoe.memory.frame_sets import USED, FrameSets, Places


class PageIn(NamedTuple):
    layer: int
    expert: int
    frame: int


class Step:
    """Begun with what was lent, or with what another step makes of it. A place beyond a set's size is left as garbage."""

    def __init__(self, lent: FrameSets):
        self.sets = lent.copy()
        self.page_ins: list[PageIn] = []
        self.shortfall = 0  # experts that found no place
        for layer, size in enumerate(lent.sizes.tolist()):
            self.sets.owners[layer, size:], self.sets.keys[layer, size:] = 3, USED

    def join(self, load: Load) -> None:
        """The letter of a prefetch is read: its frame is a place of the layer's set from now on."""
        layer, sets = load.layer, self.sets
        place = int(sets.sizes[layer])
        is_new = load.expert not in sets.owners[layer, :place]
        sets.frames[layer, place] = load.frame
        sets.owners[layer, place] = load.expert if is_new else ABSENT
        sets.keys[layer, place] = USED - 1
        sets.sizes[layer] += 1

    def compute(self, layer: int, needed: Set[int]) -> None:
        size = int(self.sets.sizes[layer])
        owners, keys = self.sets.owners[layer], self.sets.keys[layer]
        found = [place for place in range(size) if owners[place] in needed]
        free = [place for place in range(size) if owners[place] not in needed]
        free.sort(key=lambda place: (owners[place] >= 0, keys[place] * (owners[place] >= 0), place))
        missing = sorted(needed - {int(owners[place]) for place in found})
        served = list(zip(missing, free, strict=False))
        for expert, place in served:
            owners[place] = expert
            self.page_ins.append(PageIn(layer, expert, int(self.sets.frames[layer, place])))
        keys[found + [place for _, place in served]] = USED
        self.shortfall += len(missing) - len(served)


def run_step(lent: FrameSets, routed: Sequence[Set[int]]) -> Step:
    """Each layer uses its `routed` experts; nothing comes meanwhile."""
    step = Step(lent)
    for layer, needed in enumerate(routed):
        step.compute(layer, needed)
    return step


def sets_behind(step: Step, expert_keys: Places) -> FrameSets:
    """What a step finds that goes on with them: what the one before it has used has the keys of all others again."""
    sets = step.sets.copy()
    is_used = sets.keys == USED
    layers, places = is_used.nonzero()
    sets.keys[is_used] = expert_keys[layers, sets.owners[layers, places].clip(0)]
    return sets
