"""The arena and the experts as a drawing of letters, for people to look at. Changes nothing, and nothing depends on it."""

import numpy as np
import numpy.typing as npt

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Frames
from sglmoe.memory.expert_values import Values
from sglmoe.memory.experts import ABSENT, ExpertTable
from sglmoe.memory.kv_pages import PagePool
from sglmoe.memory.packed_slabs import PackedSlabs
from sglmoe.protocol import FRAME_KINDS, HEAT_LEVELS, RESIDENCY, MemoryMap

FRAME = {kind: ord(letter) for kind, letter in FRAME_KINDS.items()}
LETTERS = np.frombuffer("".join(RESIDENCY.values()).encode(), np.uint8)
STORED, HOST, PACKED, LOADING, AHEAD, RESIDENT = range(len(RESIDENCY))
LEVELS = np.frombuffer(HEAT_LEVELS.encode(), np.uint8)


def draw_memory(
    frames: Frames,
    pool: PagePool,
    table: ExpertTable,
    slabs: PackedSlabs,
    demand: Values,
    *,
    policy: MemoryPolicy,
    is_in_host: npt.NDArray[np.bool_],
) -> MemoryMap:
    """`demand` is `ExpertValues.demand`, `is_in_host` says who has a block: `[num_layers, num_experts]` both."""
    is_share = policy is MemoryPolicy.COST_AWARE
    shares = demand if is_share else ranks(demand)
    return MemoryMap(
        frames=draw_frames(frames, pool, table, slabs),
        residency=draw_residency(table, slabs, is_in_host),
        heat=rows_of(LEVELS[heat_levels(shares)]),
        heat_is="share" if is_share else "rank",
    )


def draw_frames(frames: Frames, pool: PagePool, table: ExpertTable, slabs: PackedSlabs) -> str:
    """A letter of `FRAME_KINDS` for each frame."""
    drawn = bytearray(FRAME_KINDS["cached"].encode() * len(frames))
    for frame in pool.held_frames():
        drawn[frame] = FRAME["kv"]
    for frame in frames.free_frames():
        drawn[frame] = FRAME["free"]
    for frame in frames.expert_frames():
        drawn[frame] = FRAME["expert"]
    for frame in slabs.held_frames():
        drawn[frame] = FRAME["packed"]
    for load in table.loading.values():
        drawn[load.frame] = FRAME["loading"]
    return drawn.decode()


def draw_residency(
    table: ExpertTable, slabs: PackedSlabs, is_in_host: npt.NDArray[np.bool_]
) -> tuple[str, ...]:
    """A letter of `RESIDENCY` for each expert, by layer."""
    states = np.where(is_in_host, HOST, STORED)
    states[slabs.is_packed] = PACKED
    states[table.frame_table != ABSENT] = RESIDENT
    states[table.is_unused] = AHEAD
    for load in table.loading.values():
        states[load.layer, load.expert] = LOADING
    return rows_of(LETTERS[states])


def heat_levels(shares: Values) -> npt.NDArray[np.intp]:
    """Of shares from 0 to 1; level n stands for ``(n / highest) ** 2``, as most experts are used in few steps."""
    levels: npt.NDArray[np.intp] = np.rint(np.sqrt(shares) * (len(LEVELS) - 1)).astype(np.intp)
    return levels


def ranks(values: Values) -> Values:
    """The share of all experts that have a lower value."""
    order = np.sort(values, axis=None)
    return np.searchsorted(order, values) / max(1, values.size)


def rows_of(letters: npt.NDArray[np.uint8]) -> tuple[str, ...]:
    return tuple(row.tobytes().decode() for row in letters)
