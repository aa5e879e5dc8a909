"""What a decode step that runs without the host may work with, and how layers share the frames: pure functions.

Each layer has a frame set: the frames of its residents, and empty ones. The step replaces within it; between two steps frames
move from set to set.
"""

from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.memory.expert_values import Values
from sglmoe.memory.experts import ABSENT

Counts: TypeAlias = npt.NDArray[np.intp]  # [num_layers]
Places: TypeAlias = npt.NDArray[np.int32]  # [num_layers, num_experts]

USED = 0x7F800000  # the key of what the step has used: float32's infinity, seen as int32
MAX_VALUE = np.finfo(np.float32).max


class FrameSets(msgspec.Struct, frozen=True, eq=False):
    """The sets of L layers of E experts, of E places at most: by owner, then the empty ones. Not to be changed."""

    sizes: npt.NDArray[np.int32]  # [L], the first so many places of a row count
    frames: Places  # -1 beyond, when they are lent
    owners: Places  # the expert in each place, ABSENT: none
    keys: Places  # the lowest changes hands first; USED of what the step has used
    expert_keys: Places | None = None  # of all experts, when they are lent: the keys of who comes

    def copy(self) -> "FrameSets":
        """But for `expert_keys`."""
        return FrameSets(
            self.sizes.copy(), self.frames.copy(), self.owners.copy(), self.keys.copy()
        )


def lay_out(
    frame_table: Places, values: Values, sizes: Counts, free_frames: npt.NDArray[np.int32]
) -> FrameSets:
    """Sets of these sizes: a layer's residents, and as many of the free frames as they leave room for.

    Values are none below 0, and so are the bits of float32, which then have the same order as int32.
    """
    frames = np.full(frame_table.shape, ABSENT, np.int32)
    owners, keys = frames.copy(), np.zeros_like(frames)
    place = np.arange(frame_table.shape[1])
    is_resident = frame_table != ABSENT
    is_owned = place < np.count_nonzero(is_resident, axis=1)[:, np.newaxis]
    is_empty = (place < sizes[:, np.newaxis]) & ~is_owned
    residents = np.flatnonzero(is_resident)  # layer by layer, and so are the owned places
    frames[is_owned] = frame_table.take(residents)
    owners[is_owned] = residents % len(place)
    expert_keys = np.minimum(values, MAX_VALUE).astype(np.float32).view(np.int32)
    keys[is_owned] = expert_keys.take(residents)
    frames[is_empty] = free_frames
    return FrameSets(sizes.astype(np.int32), frames, owners, keys, expert_keys)


def plan_quotas(values: Values, num_frames: int, least: int) -> Counts:
    """How many frames each layer should have: as many of its experts as are among the `num_frames` most valuable of all.

    The `least` most valuable of each layer are always among them; of equals, layers have as many. `values`: see
    `ExpertValues.demand`. No layer has more frames than experts.
    """
    num_layers, num_experts = values.shape
    num_left = num_frames - num_layers * least
    assert num_left >= 0, f"{num_frames} frames are not {least} for each of {num_layers} layers"
    others = np.sort(values, axis=1)[:, : num_experts - least]
    if num_left >= others.size:
        return np.full(num_layers, num_experts)
    last_out = others.size - num_left - 1
    bound = np.partition(others, last_out, axis=None)[last_out]
    above: Counts = np.count_nonzero(others > bound, axis=1)
    equal: Counts = np.count_nonzero(others == bound, axis=1)
    return least + above + spread(num_left - int(above.sum()), equal)


def plan_sizes(
    num_resident: Counts,
    quotas: Counts,
    misses: Counts,
    *,
    num_free: int,
    least: int,
    most: Counts,
) -> Counts:
    """How many frames each set is to have.

    A layer below its quota gets as many as it has missed lately, even from layers above theirs, and one below `least` gets
    what it lacks in any case. What is then still free goes to layers below their quotas, and then to all, as far as `most`
    lets it. Quotas are `least` to `most`, and all together no more than residents and free frames.
    """
    lacking = np.maximum(quotas - num_resident, 0)
    wanted: Counts = np.minimum(lacking, misses)
    wanted = np.maximum(wanted, least - num_resident)
    num_left = num_free - int(wanted.sum())
    if num_left <= 0:
        surplus = np.maximum(num_resident - quotas, 0)
        return num_resident + wanted - spread(-num_left, surplus)
    more = spread(num_left, lacking - wanted)
    sizes = num_resident + wanted + more
    return sizes + spread(num_left - int(more.sum()), most - sizes)


def spread(amount: int, room: Counts) -> Counts:
    """Hand out `amount`, or less if there is less room: one at a time to each that has room left, in turns."""
    if amount <= 0:
        return np.zeros_like(room)
    has_room = np.arange(room.max(initial=0))[:, np.newaxis] < room  # [turn, layer]
    is_given = has_room & (has_room.cumsum().reshape(has_room.shape) <= amount)
    given: Counts = np.count_nonzero(is_given, axis=0)
    return given
