"""How many requests should run at once, and how many frames that leaves to experts.

KV of running requests always takes frames from cached experts, so a server that admits as many
requests as KV has room for may leave experts so few frames that each step waits for loads. Here the
time of a decode step is predicted over the number of running requests, and the number is chosen that
promises the most tokens per second. Pure functions of a frozen snapshot; nobody is evicted here.

The miss curve takes requests as independent, steps too, and the policy as one that keeps what is used
most. What that gets wrong is corrected by the ratio of misses measured to misses predicted. The dead
zone is that of FluxMoE's planner (arXiv 2604.02715).
"""

import math
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.protocol import ResidencyPlan
from sglmoe.units import ceil_div

# Arbitrary. More requests are let in for a gain of more than this, and requests are held back for more than that: what is
# predicted of a live server is often wrong by as much (`docs/design.md`) ...
MIN_GAIN_RATIO = 0.05
MIN_GAIN_RATIO_OF_HOLDING_BACK = 0.1
# ... and the number of running requests by this share of it, at most.
MAX_CHANGE_RATIO = 0.25
# Arbitrary. What was measured with r requests is believed up to so many times r.
MAX_EXTRAPOLATION = 2
# Arbitrary. Of more numbers than this so many are tried, evenly on a logarithmic scale.
NUM_TRIED = 12
# What 64 steps can't tell from "in every step".
MAX_PROBABILITY = 1 - 1 / 64
# FluxMoE's dead zone of compute / load seconds. Above it no load is waited for, and fewer requests are
# never predicted to be better; below, its planner would give frames to experts, ours what is predicted.
BALANCED_RATIOS = (0.9, 1.0)


class StepModel(msgspec.Struct, frozen=True):
    """The time of a decode step: what it computes, and what it loads."""

    fixed_seconds: float
    request_seconds: float  # for each running request
    load_seconds: float  # for each expert that has to be loaded
    loads_overlap: bool = False  # with computing

    def compute_seconds(self, num_running: float) -> float:
        return self.fixed_seconds + self.request_seconds * num_running

    def step_seconds(self, num_running: float, num_loads: float) -> float:
        compute, load = self.compute_seconds(num_running), self.load_seconds * num_loads
        return max(compute, load) if self.loads_overlap else compute + load


class ExpertUses(NamedTuple):
    """How likely each expert, resident or not, is used in a decode step."""

    probability: npt.NDArray[np.float64]  # [num_layers, num_experts]
    num_running: float  # mean number of requests in the steps it was measured in


class MissCurve:
    """Misses of a decode step over the number of running requests and the frames of experts.

    An expert that is used in a step of r requests with probability p is used by each of them with
    ``q = 1 - (1 - p)^(1 / r)``, and by any of R with ``p(R) = 1 - (1 - q)^R``.
    """

    def __init__(self, uses: ExpertUses):
        probability = np.minimum(uses.probability.ravel(), MAX_PROBABILITY)
        self.num_layers = uses.probability.shape[0]
        self.num_experts = probability.size  # of all layers
        # log(1 - q), the experts that are used most first: [num_layers * num_experts]. float32:
        # numpy's exp is four times as fast then, and an error of 1e-7 of an expert is none.
        self._log_unused = np.sort(np.log(1 - probability.astype(np.float32))) / uses.num_running

    def used(self, num_running: float) -> npt.NDArray[np.float32]:
        """How likely a step of so many requests uses each expert, the most likely first: `[num_experts]`."""
        used: npt.NDArray[np.float32] = 1 - np.exp(np.float32(num_running) * self._log_unused)
        return used

    def misses(self, num_running: float, frames: int, *, correction: float = 1.0) -> float:
        """Expected number of experts to load in a step; corrected, but not more than are used.

        Those used most are resident, but for the frames that loaded ones pass through: as many as
        a layer loads at a time.
        """
        used = self.used(num_running)
        beyond = float(used[frames:].sum())
        passing = min(frames, ceil(beyond / self.num_layers))
        misses = beyond + float(used[frames - passing : frames].sum())
        return (
            min(correction * misses, float(used.sum())) if correction > 1 else correction * misses
        )


class ResidencySnapshot(msgspec.Struct, frozen=True):
    """What a plan is made from."""

    num_frames: int
    floor_frames: int  # never taken by KV
    pages_per_frame: int
    pages_per_request: float  # mean KV of a running request until the next plan
    num_running: int
    max_running: int
    curve: MissCurve
    model: StepModel | None  # None while nothing has been measured
    miss_correction: float = 1.0  # misses measured / misses predicted
    limit: int | None = None  # on running requests, as it is now


class Prediction(NamedTuple):
    """A decode step with so many requests."""

    num_running: int
    expert_frames: int
    misses: float
    compute_seconds: float
    load_seconds: float
    step_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.num_running / self.step_seconds


def plan_residency(now: ResidencySnapshot) -> ResidencyPlan:
    """The limit on running requests that promises the most tokens per second, and what follows.

    The present limit stays unless another number promises enough more (`is_worth_it`); steps are of
    MAX_CHANGE_RATIO, seen from what runs. There is no limit (None) while nothing is known, where all
    experts fit anyway, and where KV memory or `max_running` sets it.
    """
    if now.model is None:
        return ResidencyPlan(reason="no decode step has been measured yet")
    most = most_running(now)
    if expert_frames(now, most) >= now.curve.num_experts:
        reason = f"all {now.curve.num_experts} experts fit beside the KV of {most} requests"
        return describe(None, predict(now, now.model, now.num_running), reason)
    present = min(now.num_running, now.limit or now.num_running)
    tried = [predict(now, now.model, number) for number in numbers_to_try(present, most)]
    at_present = next(p for p in tried if p.num_running == present)
    better = [prediction for prediction in tried if is_worth_it(prediction, at_present)]
    best = max(better, key=lambda p: p.tokens_per_second, default=at_present)
    if why := reason_to_stay(now.model, at_present, best):
        return describe(now.limit, at_present, why)
    limit = next_limit(now, present, best.num_running, most)
    if limit == now.limit:
        return describe(limit, at_present, f"{present} run, and nothing keeps more from running")
    prediction = predict(now, now.model, limit or most)
    return describe(limit, prediction, reason_to_change(at_present, best, prediction))


def most_running(now: ResidencySnapshot) -> int:
    """As many requests as KV has room for, `max_running` at most and 1 at least."""
    pages = (now.num_frames - now.floor_frames) * now.pages_per_frame
    return max(1, min(now.max_running, int(pages / now.pages_per_request)))


def expert_frames(now: ResidencySnapshot, num_running: float) -> int:
    """Frames that the KV of so many requests leaves to experts."""
    kv_pages = ceil(now.pages_per_request * num_running)
    kv_frames = ceil_div(kv_pages, now.pages_per_frame)
    return max(now.floor_frames, now.num_frames - kv_frames)


def predict(now: ResidencySnapshot, model: StepModel, num_running: int) -> Prediction:
    """A decode step with so many requests."""
    frames = expert_frames(now, num_running)
    misses = now.curve.misses(num_running, frames, correction=now.miss_correction)
    return Prediction(
        num_running=num_running,
        expert_frames=frames,
        misses=misses,
        compute_seconds=model.compute_seconds(num_running),
        load_seconds=model.load_seconds * misses,
        step_seconds=model.step_seconds(num_running, misses),
    )


def numbers_to_try(present: int, most: int) -> list[int]:
    """Numbers of running requests to predict for, ascending; the present one is among them."""
    highest = max(1, min(most, MAX_EXTRAPOLATION * present))
    if highest <= NUM_TRIED:
        return sorted({*range(1, highest + 1), present})
    spread = np.geomspace(1, highest, NUM_TRIED).round().astype(int)
    change = int(present * MAX_CHANGE_RATIO)
    nearby = {present, present - change, min(present + change, highest)}
    return sorted(nearby.union(spread.tolist()))


def is_worth_it(other: Prediction, present: Prediction) -> bool:
    """Whether it promises so many more tokens a second that running more, or fewer, is worth trying."""
    is_fewer = other.num_running < present.num_running
    least = MIN_GAIN_RATIO_OF_HOLDING_BACK if is_fewer else MIN_GAIN_RATIO
    return other.tokens_per_second > present.tokens_per_second * (1 + least)


def reason_to_stay(model: StepModel, present: Prediction, best: Prediction) -> str:
    """Why the limit should not change; empty if it should."""
    if best is present:
        return (
            f"{present.num_running} run, {present.misses:.1f} misses a step; no more promise {MIN_GAIN_RATIO:.0%} "
            f"above {present.tokens_per_second:.1f} tokens/s, no fewer {MIN_GAIN_RATIO_OF_HOLDING_BACK:.0%}"
        )
    if not model.loads_overlap or not present.load_seconds:
        return ""
    rho = present.compute_seconds / present.load_seconds
    lowest, highest = BALANCED_RATIOS
    if lowest <= rho <= highest:
        return (
            f"computing takes {rho:.2f} of the time of loading, which hides it all but for little"
        )
    return ""


def next_limit(now: ResidencySnapshot, present: int, best: int, most: int) -> int | None:
    """The limit one step closer to the best number. Only a limit that holds requests back is raised."""
    change = max(1, int(present * MAX_CHANGE_RATIO))
    if best < present:
        return max(best, present - change)
    if now.limit is None or now.num_running + change < now.limit:
        return now.limit
    limit = min(best, now.limit + change)
    return None if limit >= most else limit


def reason_to_change(present: Prediction, best: Prediction, chosen: Prediction) -> str:
    return (
        f"{chosen.num_running} requests at a time promise {chosen.tokens_per_second:.1f} tokens/s "
        f"with {chosen.misses:.1f} misses a step in {chosen.expert_frames} frames, {present.num_running} "
        f"{present.tokens_per_second:.1f} with {present.misses:.1f} in {present.expert_frames}; "
        f"the best are {best.num_running} with {best.tokens_per_second:.1f}"
    )


def describe(limit: int | None, prediction: Prediction, reason: str) -> ResidencyPlan:
    return ResidencyPlan(
        running_limit=limit,
        expert_frames=prediction.expert_frames,
        num_running=prediction.num_running,
        misses=prediction.misses,
        step_seconds=prediction.step_seconds,
        tokens_per_second=prediction.tokens_per_second,
        reason=reason,
    )


def ceil(number: float) -> int:
    """Rounded up, but not for an error of rounding."""
    return math.ceil(number - 1e-6)
