"""What steps cost, learned from the steps that have run.

Time that a step waited for experts is taken out by whoever calls, and given to `note_loads`.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglmoe.memory.residency import StepModel
from sglmoe.protocol import StepCosts

# Arbitrary: after so many notes of a kind, one counts half.
DECODE_HALF_LIFE = 256
PREFILL_HALF_LIFE = 32
LOAD_HALF_LIFE = 64
# Arbitrary, in passes: how many experts a pass loads follows how many frames KV leaves them.
STREAM_HALF_LIFE = 4
# Arbitrary: shorter prefills say more about a step's fixed cost than about tokens.
MIN_PREFILL_TOKENS = 32
# Arbitrary, in requests or loads squared: with all steps of nearly one size there is no slope to see.
MIN_VARIANCE = 0.25
# Arbitrary: of each step. More would change nothing but the first steps.
SWEEPS = 4
# Arbitrary: of computing, so much at most is blamed on loads, and nothing in so many first steps, which load the most
# and are slow for other reasons.
MOST_SLOWED = 0.5
MIN_STEPS = 32


@dataclass(slots=True)
class DecayedRatio:
    """Sum of amounts over sum of counts, each note weighing less than the next."""

    half_life: int
    _amount: float = 0.0
    _count: float = 0.0

    def note(self, amount: float, count: float) -> None:
        decay = 0.5 ** (1 / self.half_life)
        self._amount = decay * self._amount + amount
        self._count = decay * self._count + count

    @property
    def ratio(self) -> float | None:
        """None before the first note."""
        return self._amount / self._count if self._count else None


class DecodeFit:
    """Seconds of a decode step over its rows and the experts that it loaded: exponentially weighted least squares.

    A slope once seen stays while all steps are alike in what it is of; neither slopes nor the fixed
    part are negative. Of rows and loads that always go together, the time stays with whichever had it.
    """

    def __init__(self, half_life: int = DECODE_HALF_LIFE):
        self._decay = 0.5 ** (1 / half_life)
        self._weight = 0.0
        self._mean: npt.NDArray[np.float64] = np.zeros(3)  # rows, loads, seconds
        self._products: npt.NDArray[np.float64] = np.zeros((3, 3))  # covariance times the weight
        self._slopes = [0.0, 0.0]  # seconds for each row, and for each load
        self._most = [math.inf, math.inf]  # of each
        self._num_steps = 0

    def note(
        self,
        num_rows: int,
        num_loads: float,
        seconds: float,
        *,
        most_load_seconds: float = math.inf,
    ) -> None:
        """A step, of which no load has taken more than so much.

        Weighted incremental update: West, Updating mean and variance estimates (1979).
        """
        self._num_steps += 1
        self._most = [math.inf, most_load_seconds]
        old_weight = self._decay * self._weight
        self._weight = old_weight + 1
        off = np.array([num_rows, num_loads, seconds]) - self._mean
        self._products = self._decay * self._products + old_weight / self._weight * np.outer(
            off, off
        )
        self._mean += off / self._weight
        self._descend()

    def _descend(self) -> None:
        """Coordinate descent: each slope given the other; over the steps it comes to the least squares."""
        products = self._products.tolist()
        for _ in range(SWEEPS):
            for its, other in ((0, 1), (1, 0)):
                if products[its][its] >= MIN_VARIANCE * self._weight:
                    alone = products[its][2] - products[its][other] * self._slopes[other]
                    self._slopes[its] = max(0.0, alone / products[its][its])
                self._slopes[its] = min(self._slopes[its], self._most[its])

    @property
    def line(self) -> tuple[float, float, float] | None:
        """(fixed seconds, seconds for each row, and for each load); None before the first step."""
        if not self._weight:
            return None
        rows, loads, seconds = self._mean.tolist()
        load_slope = self._slopes[1] if self._num_steps > MIN_STEPS else 0.0
        if loads:
            load_slope = min(load_slope, MOST_SLOWED * seconds / loads)
        seconds -= load_slope * loads
        row_slope = min(self._slopes[0], seconds / rows)
        return seconds - row_slope * rows, row_slope, load_slope


class StepTimes:
    """The owner of all measured times. `loads_overlap`: whether loads run while the device computes."""

    def __init__(self, *, loads_overlap: bool = False):
        self._loads_overlap = loads_overlap
        self._decode = DecodeFit()
        self._prefill = DecayedRatio(PREFILL_HALF_LIFE)
        self._waits = DecayedRatio(LOAD_HALF_LIFE)
        self._links = DecayedRatio(LOAD_HALF_LIFE)
        self._pass_loads = DecayedRatio(STREAM_HALF_LIFE)
        self._decode_loads = DecayedRatio(DECODE_HALF_LIFE)

    def note_decode(self, num_rows: int, compute_seconds: float, num_loads: float = 0) -> None:
        """A step that decoded `num_rows` requests and did nothing else."""
        self._decode_loads.note(num_loads, 1)
        self._decode.note(
            num_rows, num_loads, compute_seconds, most_load_seconds=self._most_slowdown
        )

    def note_prefill(self, num_tokens: int, compute_seconds: float, num_loads: float = 0) -> None:
        """A pass over prompts, of so many tokens with the rows that decoded in it; short ones are ignored."""
        if num_tokens >= MIN_PREFILL_TOKENS:
            self._pass_loads.note(num_loads, 1)
            slowed = min(self._slowdown * num_loads, compute_seconds * MOST_SLOWED)
            self._prefill.note(compute_seconds - slowed, num_tokens)

    def note_loads(self, num_experts: float, *, waited_seconds: float, link_seconds: float) -> None:
        """A step that loaded experts on demand: how long it waited for them, and how long they took."""
        if num_experts:
            self._waits.note(waited_seconds, num_experts)
            self._links.note(link_seconds, num_experts)

    @property
    def load_seconds(self) -> float | None:
        """What a step is longer by for an expert: the wait for it, and what computing is slower by while
        it comes. None before one was loaded, and on a device, which the host does not see waiting, before
        steps that load more are seen to be longer.

        Two cores that compute share them and their memory's bandwidth with whoever copies: of a load
        of the random model's 3 MB there, the step waits for 0.2 ms and takes 0.6 ms longer.
        """
        waited = self._waits.ratio
        if waited is None or not any((waited, self._links.ratio, self._slowdown)):
            return None
        return waited + self._slowdown

    @property
    def link_seconds(self) -> float | None:
        """What the link takes for an expert, among others of its layer; None before one was loaded."""
        return self._links.ratio

    @property
    def prefill_token_seconds(self) -> float | None:
        """For a token of a prompt; None before MIN_PREFILL_TOKENS were computed in a step."""
        return self._prefill.ratio

    def costs(self, *, absent_experts: int) -> StepCosts:
        """What is known, for the scheduler. A pass over prompts takes every expert that it uses: it loads as many as
        the last ones did, but no more than are absent."""
        line = self._decode.line or (0.0, 0.0, 0.0)
        load_seconds = self.load_seconds or 0.0
        pass_loads = min(self._pass_loads.ratio or 0.0, absent_experts)
        return StepCosts(
            stream_seconds=pass_loads * load_seconds,
            token_seconds=self.prefill_token_seconds or 0.0,
            decode_seconds=line[0] + (self._decode_loads.ratio or 0.0) * load_seconds,
            row_seconds=line[1],
            loads_overlap=self._loads_overlap,
        )

    @property
    def model(self) -> StepModel | None:
        """None before the first decode step; an expert that was never loaded costs nothing."""
        line = self._decode.line
        if line is None:
            return None
        return StepModel(
            fixed_seconds=line[0],
            request_seconds=line[1],
            load_seconds=self.load_seconds or 0.0,
            loads_overlap=self._loads_overlap,
        )

    @property
    def _slowdown(self) -> float:
        """Seconds of computing for each expert that comes meanwhile."""
        line = self._decode.line
        return line[2] if line else 0.0

    @property
    def _most_slowdown(self) -> float:
        """Computing can't be held up by a load for longer than that is under way and not waited for.

        Few loads, in steps that are slow for another reason, otherwise seem to cost several times that.
        """
        links, waits = self._links.ratio, self._waits.ratio
        if not links or waits is None:  # a device that moves experts says nothing of how long
            return math.inf
        return max(0.0, links - waits)
