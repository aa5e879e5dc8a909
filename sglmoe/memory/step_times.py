"""What steps cost, learned from the steps that have run.

Time that a step waited for experts is taken out by whoever calls, and given to `note_loads`.
"""

from dataclasses import dataclass

from sglmoe.memory.residency import StepModel

# Arbitrary: after so many notes of a kind, one counts half.
DECODE_HALF_LIFE = 256
PREFILL_HALF_LIFE = 32
LOAD_HALF_LIFE = 64
# Arbitrary: shorter prefills say more about a step's fixed cost than about tokens.
MIN_PREFILL_TOKENS = 32
# Arbitrary, in requests squared: with all steps of nearly one size there is no slope to see.
MIN_VARIANCE = 0.25


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
    """Seconds of a decode step over its number of rows: exponentially weighted least squares.

    A slope once seen stays while all steps are of one size; neither slope nor fixed part is negative.
    """

    def __init__(self, half_life: int = DECODE_HALF_LIFE):
        self._decay = 0.5 ** (1 / half_life)
        self._weight = 0.0
        self._mean_rows = self._mean_seconds = 0.0
        self._variance = self._covariance = 0.0  # times the weight
        self._slope = 0.0

    def note(self, num_rows: int, seconds: float) -> None:
        """Weighted incremental update: West, Updating mean and variance estimates (1979)."""
        old_weight = self._decay * self._weight
        self._weight = old_weight + 1
        rows_off, seconds_off = num_rows - self._mean_rows, seconds - self._mean_seconds
        share = old_weight / self._weight
        self._variance = self._decay * self._variance + share * rows_off * rows_off
        self._covariance = self._decay * self._covariance + share * rows_off * seconds_off
        self._mean_rows += rows_off / self._weight
        self._mean_seconds += seconds_off / self._weight
        if self._variance >= MIN_VARIANCE * self._weight:
            self._slope = max(0.0, self._covariance / self._variance)

    @property
    def line(self) -> tuple[float, float] | None:
        """(fixed seconds, seconds for each row); None before the first step."""
        if not self._weight:
            return None
        slope = min(self._slope, self._mean_seconds / self._mean_rows)
        return self._mean_seconds - slope * self._mean_rows, slope


class StepTimes:
    """The owner of all measured times. `loads_overlap`: whether loads run while the device computes."""

    def __init__(self, *, loads_overlap: bool = False):
        self._loads_overlap = loads_overlap
        self._decode = DecodeFit()
        self._prefill = DecayedRatio(PREFILL_HALF_LIFE)
        self._loads = DecayedRatio(LOAD_HALF_LIFE)

    def note_decode(self, num_rows: int, compute_seconds: float) -> None:
        """A step that decoded `num_rows` requests and did nothing else."""
        self._decode.note(num_rows, compute_seconds)

    def note_prefill(self, num_tokens: int, compute_seconds: float) -> None:
        """A step that computed `num_tokens` of prompts and did nothing else; short ones are ignored."""
        if num_tokens >= MIN_PREFILL_TOKENS:
            self._prefill.note(compute_seconds, num_tokens)

    def note_loads(self, num_experts: int, seconds: float) -> None:
        """A step that loaded experts, and how long that took in all."""
        if num_experts:
            self._loads.note(seconds, num_experts)

    @property
    def load_seconds(self) -> float | None:
        """For an expert; None before one was loaded."""
        return self._loads.ratio

    @property
    def prefill_token_seconds(self) -> float | None:
        """For a token of a prompt; None before MIN_PREFILL_TOKENS were computed in a step."""
        return self._prefill.ratio

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
