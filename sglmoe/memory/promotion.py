"""Which experts come into host memory next, and which give way to them: pure."""

import msgspec
import numpy as np
import numpy.typing as npt

# A block changes hands for an expert that was missed so many times as often lately, and once more: so
# equals do not take turns, each for a read from disk. On eval/traces 1.0 reads more than it saves.
MISS_MARGIN = 1.5

Mask = npt.NDArray[np.bool_]


class TierSnapshot(msgspec.Struct, frozen=True, eq=False):
    """Host memory at one moment; arrays are `[num_layers, num_experts]`.

    Frames go on changing meanwhile, so `heat` and `is_resident` may be a little out of date: that
    costs a worse choice, nothing else.
    """

    misses: npt.NDArray[np.float32]  # how often the frames missed each expert lately
    heat: npt.NDArray[np.float64]  # how much the frames want each expert; only its order counts
    is_resident: Mask  # in a frame
    is_here: Mask  # in host memory, or on its way there
    is_evictable: Mask  # in host memory, and nobody reads it now
    is_unreadable: Mask
    num_free: int  # blocks


class Promotion(msgspec.Struct, frozen=True):
    """Read an expert into a free block, or into that of a victim, `(layer, expert)`."""

    layer: int
    expert: int
    victim: tuple[int, int] | None = None


def plan_promotions(snapshot: TierSnapshot, limit: int) -> list[Promotion]:
    """At most `limit` promotions, the most wanted first.

    An expert is wanted as often as the frames missed it lately. The miss that made a resident one
    does not count: if the frames keep it, it needs no block; if it comes and goes, it was missed
    more often. Among equals an absent expert goes before a resident one; then hot absent ones, and
    residents that will leave their frames soon, the cold ones.
    """
    num_experts = snapshot.heat.shape[1]
    need = (snapshot.misses - snapshot.is_resident).ravel()
    coldness = np.where(snapshot.is_resident, snapshot.heat, -snapshot.heat).ravel()
    order = np.lexsort((coldness, snapshot.is_resident.ravel(), -need))
    may_come = ~(snapshot.is_here | snapshot.is_unreadable).ravel()
    may_leave = snapshot.is_evictable.ravel()
    wanted: list[int] = order[may_come[order]][:limit].tolist()
    victims: list[int] = order[may_leave[order]][::-1][:limit].tolist()
    free, rest = wanted[: snapshot.num_free], wanted[snapshot.num_free :]
    promotions = [Promotion(number // num_experts, number % num_experts) for number in free]
    for number, victim in zip(rest, victims, strict=False):
        if need[number] < MISS_MARGIN * max(need[victim], 0) + 1:
            break
        layer, expert = divmod(number, num_experts)
        promotions.append(Promotion(layer, expert, divmod(victim, num_experts)))
    return promotions
