"""Which of the running requests should decode together, so that they share experts. Pure functions, and whose turn it is.

The token scheduler of ExpertFlow (He et al., arXiv 2410.17954, section 3.3): where the experts of all do not fit, two halves
of requests that take similar experts decode in turn. He splits two batches that could not run together anyway. Here they
could, and a half decodes for the same fixed price as all, so first it is asked whether that pays.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

Packed: TypeAlias = npt.NDArray[np.uint64]  # [requests, words]: a bit for each expert of each layer
Members: TypeAlias = npt.NDArray[np.intp]  # numbers of requests, ascending

# Each round of assigning and choosing medoids makes the sum of distances smaller, or is the last. He gives no number.
MAX_ROUNDS = 16
# Arbitrary: what promises less is not worth the longer time between tokens.
MIN_GAIN_RATIO = 0.05


class RecentUses(msgspec.Struct, frozen=True, eq=False):
    """What each running request used lately."""

    counts: npt.NDArray[np.uint8]  # [requests, layers, experts]: in how many of its last steps
    num_steps: int  # that these are, for each of them

    @property
    def packed(self) -> Packed:
        """What each used at all."""
        return pack(self.counts > 0)


class PassCosts(msgspec.Struct, frozen=True):
    """What a decode step costs, as the worker's step model has it (`memory/residency.py`)."""

    fixed_seconds: float
    row_seconds: float  # for each request in it
    load_seconds: float  # for each expert that it has to load
    loads_overlap: bool = False  # with computing

    def seconds(self, num_passes: float, num_rows: float, num_loads: float) -> float:
        compute = num_passes * self.fixed_seconds + num_rows * self.row_seconds
        load = num_loads * self.load_seconds
        return max(compute, load) if self.loads_overlap else compute + load


class Halves(NamedTuple):
    """Two sub-batches; the first has one request more of an odd number."""

    first: Members
    second: Members


class AffinityPlan(msgspec.Struct, frozen=True, eq=False):
    """Who decodes together, and what is expected of that."""

    halves: Halves | None  # None: all together
    num_together: int  # experts that all take, He's objective undivided
    num_in_halves: int  # that each half takes, added up: He's objective
    misses_together: float  # experts to load for a token of each
    misses_in_turn: float
    gain_ratio: float  # seconds together over seconds in turn


def plan_affinity(
    uses: RecentUses, *, expert_frames: int, costs: PassCosts, turn_steps: int
) -> AffinityPlan:
    """Split the running requests if their experts do not fit the frames and taking turns of `turn_steps` steps pays.

    Takes 5 ms for 128 requests, 48 layers of 128 experts (a shared core).
    """
    packed = uses.packed
    num_requests = len(packed)
    everyone = np.arange(num_requests)
    num_together = num_activated(packed, everyone)
    log_unused = log_unused_by(uses)
    together = expected_misses(used_by(log_unused, everyone), expert_frames)
    alone = AffinityPlan(None, num_together, num_together, together, together, 1.0)
    if num_requests < 2 or num_together <= expert_frames:
        return alone
    halves = split(packed)
    used = [used_by(log_unused, half) for half in halves]
    in_turn = misses_in_turn(used[0], used[1], expert_frames, turn_steps)
    gain = costs.seconds(1, num_requests, together) / costs.seconds(2, num_requests, in_turn)
    return AffinityPlan(
        halves if gain > 1 + MIN_GAIN_RATIO else None,
        num_together,
        sum(num_activated(packed, half) for half in halves),
        together,
        in_turn,
        gain,
    )


# ---------------------------------------------------------------------------------------------------------------- split


def pack(used: npt.NDArray[np.bool_]) -> Packed:
    """bool [requests, ...] as 64 bits a word."""
    flat = used.reshape(len(used), -1)
    packed = np.packbits(flat, axis=1)
    padding = -packed.shape[1] % 8
    return np.ascontiguousarray(np.pad(packed, ((0, 0), (0, padding)))).view(np.uint64)


def num_activated(packed: Packed, members: Members) -> int:
    """Experts, of all layers, that any of these takes."""
    return int(np.bitwise_count(np.bitwise_or.reduce(packed[members], axis=0)).sum())


def distances(packed: Packed) -> npt.NDArray[np.int64]:
    """int64 [requests, requests]: experts that one of two takes and the other does not (Hamming).

    He's similarity is 1 - d / (layers * experts): the same order.
    """
    num = len(packed)
    found = np.zeros((num, num), np.int64)
    for row in range(num - 1):
        differing = np.bitwise_count(packed[row + 1 :] ^ packed[row])
        found[row, row + 1 :] = differing.sum(axis=1, dtype=np.int64)
    return found + found.T


def split(packed: Packed) -> Halves:
    """Balanced 2-medoids: each half gathers around the request that is most like the others in it.

    Deterministic: begins with the two that differ most, and of equals the lowest numbers are taken. Sizes differ by one at
    most. Raises ValueError for fewer than two requests.
    """
    if len(packed) < 2:
        raise ValueError(f"{len(packed)} request can't be two halves")
    apart = distances(packed)
    medoids = divmod(int(apart.argmax()), len(packed))
    if medoids[0] == medoids[1]:
        medoids = (0, 1)  # all are alike
    for _ in range(MAX_ROUNDS):
        halves = assign(apart, *medoids)
        better = medoid(apart, halves.first), medoid(apart, halves.second)
        if better == medoids:
            break
        medoids = better
    return halves


def assign(apart: npt.NDArray[np.int64], first: int, second: int) -> Halves:
    """Each request to the medoid that it is closer to, as far as the halves stay equal: the smallest sum of distances."""
    order = np.argsort(apart[first] - apart[second], kind="stable")
    middle = (len(apart) + 1) // 2
    return Halves(np.sort(order[:middle]), np.sort(order[middle:]))


def medoid(apart: npt.NDArray[np.int64], members: Members) -> int:
    """The member with the least distance to the others."""
    return int(members[apart[np.ix_(members, members)].sum(axis=1).argmin()])


# ------------------------------------------------------------------------------------------------------- does it pay?


def log_unused_by(uses: RecentUses) -> npt.NDArray[np.float32]:
    """float32 [requests, experts of all layers]: log(1 - q), q how likely a request's step is to use an expert.

    With one step more that is like the average one, so that nothing is sure and nothing impossible.
    """
    num_steps, counts = uses.num_steps, uses.counts
    average = counts.mean() / num_steps if num_steps else 0.0
    by_count = np.log1p(-(np.arange(num_steps + 1, dtype=np.float32) + average) / (num_steps + 1))
    flat = counts.reshape(len(counts), -1)
    return np.take(by_count.astype(np.float32), flat)


def used_by(log_unused: npt.NDArray[np.float32], members: Members) -> npt.NDArray[np.float32]:
    """float32 [experts of all layers]: how likely a step of these requests is to use each: 1 - prod(1 - q)."""
    used: npt.NDArray[np.float32] = 1 - np.exp(log_unused[members].sum(axis=0))
    return used


def expected_misses(used: npt.NDArray[np.float32], frames: int) -> float:
    """Of a step, where those used most stay resident."""
    num_absent = len(used) - frames
    if num_absent <= 0:
        return 0.0
    return float(np.partition(used, num_absent - 1)[:num_absent].sum())


def misses_in_turn(
    first: npt.NDArray[np.float32],
    second: npt.NDArray[np.float32],
    frames: int,
    turn_steps: int,
) -> float:
    """Of a step of each half: experts that stay are those used most by both, or they are exchanged at each turn."""
    staying = expected_misses(first + second, frames)
    exchanged = np.setdiff1d(most_used(first, frames), most_used(second, frames)).size
    within = expected_misses(first, frames) + expected_misses(second, frames)
    return min(staying, within + 2 * exchanged / turn_steps)


def most_used(used: npt.NDArray[np.float32], frames: int) -> npt.NDArray[np.intp]:
    if frames >= len(used):
        return np.arange(len(used))
    return np.argpartition(-used, frames - 1)[:frames]


# --------------------------------------------------------------------------------------------------------------- turns


class Turns:
    """Whose turn it is. Two halves alternate, `turn_steps` steps each, and whoever runs decodes within `2 * turn_steps`."""

    def __init__(self, turn_steps: int) -> None:
        self._turn_steps = turn_steps
        self._halves: list[list[str]] = [[], []]  # the one whose turn it is first
        self._steps_left = turn_steps
        self._turns_left = 0

    @property
    def round_is_over(self) -> bool:
        """Whether both have had their turn, so that they may be split anew."""
        return not self._turns_left

    def begin_round(self, first: Sequence[str], second: Sequence[str]) -> None:
        self._halves = [list(first), list(second)]
        self._steps_left, self._turns_left = self._turn_steps, 2

    def next_step(self, running: Sequence[str]) -> list[str]:
        """Who decodes next, in the order of `running`. Those who came since the round began join the smaller half."""
        self._follow(running)
        if not self._halves[0]:
            self._pass_on()
        decoding = set(self._halves[0])
        self._steps_left -= 1
        if not self._steps_left:
            self._pass_on()
        return [rid for rid in running if rid in decoding]

    def _follow(self, running: Sequence[str]) -> None:
        present = set(running)
        self._halves = [[rid for rid in half if rid in present] for half in self._halves]
        known = {rid for half in self._halves for rid in half}
        for rid in running:
            if rid not in known:
                min(self._halves, key=len).append(rid)

    def _pass_on(self) -> None:
        self._halves.reverse()
        self._steps_left, self._turns_left = self._turn_steps, max(0, self._turns_left - 1)
