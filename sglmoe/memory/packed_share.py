"""How much of the arena should hold experts packed, and which of them. Pure functions of a frozen snapshot.

An expert in a frame costs nothing when it is used, a packed one its decoding, an absent one the link and its decoding.
Packed, it takes less than a frame: a run of a few frames holds more experts than it has frames. So the most used belong
in frames, the next are packed, the rest stay away; how many of each is what is planned here. FluxMoE (arXiv 2604.02715,
section 3) packs all of them and loses with few requests; here packing has to promise a gain.

Without overlap no share can gain anything where decoding takes more than `1 - frames per packed expert` of what loading
takes: a frame then saves more per byte. (The three forms' upper hull, as in Sinha and Zoltners, The multiple-choice
knapsack problem, 1979.)
"""

from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.memory.residency import MissCurve

# Arbitrary. The share is changed for steps that are shorter by this ...
MIN_GAIN_RATIO = 0.05
# ... by so much of all frames at a time. A stall that is no longer by that is as good as the shortest.
MAX_CHANGE_RATIO = 0.25
NEAR_RATIO = 0.02
# Arbitrary. Whoever is packed stays so until another expert, or a frame for it, is worth so many times as much.
KEEP_MARGIN = 1.25
# Arbitrary. Longer runs are harder to find; 5 frames hold 7 experts at the codec's 0.706, which wastes one in a hundred.
MAX_RUN_FRAMES = 8

# With fewer requests at a time nothing is packed. One stays with its experts for some steps: frames then hit more often than
# uses that are independent of each other would, which is what is reckoned with. Waits of a lone request were 1.5 and 1.8
# times as long as without (docs/measuring.md, Packed in the arena).
MIN_RUNNING = 1.5

Seconds = TypeVar("Seconds", float, npt.NDArray[np.float64])


class Form(IntEnum):
    """How an expert should be held in the arena."""

    AWAY = 0
    PACKED = 1
    READY = 2  # in a frame


class SlabClass(NamedTuple):
    """A run of so many adjacent frames holds so many packed experts."""

    frames: int
    experts: int

    @property
    def frames_per_expert(self) -> float:
        return self.frames / self.experts


class FormCosts(msgspec.Struct, frozen=True):
    """Seconds for an expert that a step uses and has not in a frame."""

    link_seconds: float  # to bring it, as it is stored
    decode_seconds: float
    overlap: bool = False  # whether one is decoded while another is on the link

    @property
    def load_seconds(self) -> float:
        """Of an expert that comes alone."""
        return self.link_seconds + self.decode_seconds

    def stall_seconds(self, num_packed: Seconds, num_loaded: Seconds) -> Seconds:
        """For so many experts that were packed, and so many that were away."""
        link, decode = (
            self.link_seconds * num_loaded,
            self.decode_seconds * (num_packed + num_loaded),
        )
        longer: Seconds = np.maximum(link, decode) if self.overlap else link + decode
        return longer


class PackedSnapshot(msgspec.Struct, frozen=True):
    """What a plan is made from."""

    curve: MissCurve
    num_running: float
    num_frames: int  # that experts have, ready and packed
    floor_frames: int  # that stay frames: what is decoded goes through them
    slab: SlabClass | None  # None: packed experts are no smaller
    costs: FormCosts
    compute_seconds: float = 0.0  # of a step, beside its stall
    packed_frames: int = 0  # as it is now


class PackedPlan(msgspec.Struct, frozen=True):
    """What a plan says."""

    packed_frames: int
    num_packed: int  # experts that these hold
    stall_seconds: float  # of a step, as predicted
    ready_only_seconds: float  # likewise, with nothing packed
    reason: str


class Shares(NamedTuple):
    """Every share that is possible, by number of runs: `[num_runs + 1]` each."""

    ready: npt.NDArray[np.intp]  # experts that stay in frames
    packed: npt.NDArray[np.intp]  # experts that stay packed
    num_packed: npt.NDArray[np.float64]  # of these, that a step uses
    num_loaded: npt.NDArray[np.float64]


def plan_slab_class(
    packed_bytes: int, frame_bytes: int, *, max_frames: int = MAX_RUN_FRAMES
) -> SlabClass | None:
    """The run that takes the fewest frames per packed expert, and the shortest of these; None where none saves any."""
    classes = (
        SlabClass(frames, frames * frame_bytes // packed_bytes)
        for frames in range(1, max_frames + 1)
    )
    saving = [its for its in classes if its.experts > its.frames]
    return min(saving, key=lambda its: (its.frames_per_expert, its.frames), default=None)


def plan_packed_share(now: PackedSnapshot) -> PackedPlan:
    """The number of packed frames, a step closer to the fewest that nearly have the shortest predicted stall.

    With one request it is none, see MIN_RUNNING. Else the present number stays unless that makes steps shorter by
    MIN_GAIN_RATIO; but it never stays where nothing packed is predicted to be better, and nowhere through a share that is
    worse. It changes by MAX_CHANGE_RATIO of the frames at most: experts have to move.
    """
    if now.slab is None:
        return _describe(now, 0, "packed experts are no smaller")
    if now.num_frames >= now.curve.num_experts:
        return _describe(now, 0, f"all {now.curve.num_experts} experts fit in frames")
    if now.num_running < MIN_RUNNING:
        return _describe(now, 0, "a lone request finds more in frames than plans can tell")
    stalls = predict_stalls(now)
    present = min(now.packed_frames // now.slab.frames, len(stalls) - 1)
    best = int((stalls <= (1 + NEAR_RATIO) * stalls.min()).argmax())
    if stalls[present] > stalls[0]:
        reason = f"nothing packed promises {_ms(stalls[0])} a step, as it is {_ms(stalls[present])}"
        return _describe(now, 0, reason)
    step_seconds = now.compute_seconds + stalls
    if step_seconds[best] >= (1 - MIN_GAIN_RATIO) * step_seconds[present]:
        reason = f"no share promises steps {MIN_GAIN_RATIO:.0%} shorter, with a stall of {_ms(stalls[present])}"
        return _describe(now, present, reason)
    change = max(1, int(MAX_CHANGE_RATIO * now.num_frames) // now.slab.frames)
    runs = min(max(best, present - change), present + change)
    if stalls[runs] > stalls[present]:
        reason = f"the way to fewer stalls than {_ms(stalls[present])} leads through {_ms(stalls[runs])} a step"
        return _describe(now, present, reason)
    reason = (
        f"{best * now.slab.frames} packed frames promise a stall of {_ms(stalls[best])} a step, "
        f"{present * now.slab.frames} of {_ms(stalls[present])}"
    )
    return _describe(now, runs, reason)


def fix_packed_share(now: PackedSnapshot, share: float) -> PackedPlan:
    """That share of the frames, whatever it promises; in whole frames, and all but the floor at most."""
    frames = min(int(share * now.num_frames), max(0, now.num_frames - now.floor_frames))
    slab = now.slab or SlabClass(1, 1)
    plan = _describe(now, frames // slab.frames, f"{share:.0%} was asked for")
    return msgspec.structs.replace(plan, packed_frames=frames)


def predict_stalls(now: PackedSnapshot) -> npt.NDArray[np.float64]:
    """Seconds that a step waits for experts, by number of runs: `[num_runs + 1]`."""
    shares = _shares(now)
    return now.costs.stall_seconds(shares.num_packed, shares.num_loaded)


def plan_residence_forms(
    probability: npt.NDArray[np.floating[Any]], *, num_ready: int, num_packed: int
) -> npt.NDArray[np.int8]:
    """The form that each expert should have, `[num_layers, num_experts]`, from how likely a step uses it.

    Of equals, which are all of them in a large batch, every layer has as many.
    """
    num_layers, num_experts = probability.shape
    order = np.argsort(-probability.T.ravel(), kind="stable")
    forms = np.full(order.size, Form.AWAY, np.int8)
    forms[order[:num_ready]] = Form.READY
    forms[order[num_ready : num_ready + num_packed]] = Form.PACKED
    return forms.reshape(num_experts, num_layers).T


def plan_packed_experts(
    probability: npt.NDArray[np.floating[Any]],
    is_packed: npt.NDArray[np.bool_],
    *,
    num_ready: int,
    limit: int,
) -> list[tuple[int, int]]:
    """At most so many experts that should be packed, the most used first: those that come after the `num_ready` most used.

    As `plan_residence_forms`, but for KEEP_MARGIN. `probability` and `is_packed`: `[num_layers, num_experts]`.
    """
    num_layers = len(probability)
    used, packed = probability.T.ravel(), is_packed.T.ravel()
    order = np.argsort(-np.where(packed, used / KEEP_MARGIN, used), kind="stable")[num_ready:]
    kept = np.where(packed, used * KEEP_MARGIN, used)[order]
    chosen = order[np.argsort(-kept, kind="stable")][:limit].tolist()
    return [(number % num_layers, number // num_layers) for number in chosen]


def expected_residents(now: PackedSnapshot, packed_frames: int) -> tuple[int, int]:
    """How many experts stay in frames and how many packed, with that share."""
    if now.slab is None:
        return min(now.num_frames, now.curve.num_experts), 0
    shares, runs = _shares(now), packed_frames // now.slab.frames
    return int(shares.ready[runs]), int(shares.packed[runs])


def _shares(now: PackedSnapshot) -> Shares:
    """Frames that loaded and decoded experts pass through hold none for long: as many as a layer needs at a time."""
    assert now.slab is not None
    runs = np.arange(max(0, now.num_frames - now.floor_frames) // now.slab.frames + 1)
    sums = np.concatenate([[0.0], np.cumsum(now.curve.used(now.num_running), dtype=np.float64)])
    total, most = sums[-1], now.curve.num_experts
    frames = np.minimum(now.num_frames - now.slab.frames * runs, most)
    passing = np.ceil((total - sums[frames]) / now.curve.num_layers - 1e-6).astype(np.intp)
    ready = frames - np.minimum(frames, passing)
    packed = np.minimum(now.slab.experts * runs, most - ready)
    return Shares(ready, packed, sums[ready + packed] - sums[ready], total - sums[ready + packed])


def _describe(now: PackedSnapshot, runs: int, reason: str) -> PackedPlan:
    stalls = predict_stalls(now) if now.slab is not None else np.zeros(1)
    slab = now.slab or SlabClass(1, 1)
    return PackedPlan(
        packed_frames=runs * slab.frames,
        num_packed=runs * slab.experts,
        stall_seconds=float(stalls[runs]),
        ready_only_seconds=float(stalls[0]),
        reason=reason,
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"
