"""Watches the worker's steps: what they cost, and what that makes of the prices that memory reckons with."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sglmoe.memory.step_times import StepTimes
from sglmoe.protocol import MemorySnapshot, StepCosts
from sglmoe.worker.request import BatchRow, WorkerRequest

# Arbitrary: a price is new when it differs so much from the last one. Each is a line of a routing trace.
PRICE_CHANGE = 1.1


class StepKind(NamedTuple):
    """What a step was about to do."""

    decoding: Sequence[WorkerRequest]
    num_prefill_tokens: int

    @classmethod
    def of(cls, rows: Sequence[BatchRow]) -> "StepKind":
        """To be called before the rows have run."""
        decoding = [row.request for row in rows if row.decodes]
        return cls(decoding, sum(row.stop - row.start for row in rows if not row.decodes))

    @property
    def num_decoding(self) -> int:
        """Rows of a step that only decoded; 0 for any other step."""
        return 0 if self.num_prefill_tokens else len(self.decoding)


class StepCost(NamedTuple):
    """How long a step took, how much of that it waited for experts, and for how many."""

    seconds: float
    stall_seconds: float
    misses: int
    late_seconds: float = 0.0  # of the wait, for experts that were on their way already
    num_late: int = 0  # of the misses
    load_seconds: float = 0.0  # that loads of the others took, whether the step waited or not
    saved_loads: float = 0.0  # of the misses, what is saved by decoding some from the arena

    @property
    def num_loads(self) -> float:
        """As many whole loads take as long as what the step brought in."""
        return self.misses - self.saved_loads


class Price(NamedTuple):
    """As `MemoryManager.set_prices` takes them."""

    expert_nanoseconds: int
    token_nanoseconds: int


class StepWatch:
    """Teaches `times`. `price` is what memory reckons with at first; of `num_experts` some are in frames. `decode_ratio`
    says what decoding a packed expert takes of what a load takes."""

    def __init__(
        self,
        times: StepTimes,
        price: Price,
        *,
        num_experts: int,
        decode_ratio: Callable[[], float] = lambda: 1.0,
    ):
        self._times = times
        self._decode_ratio = decode_ratio
        self._packed_hits = 0
        self._num_experts = num_experts
        self._price = price
        self._before = StepCost(0.0, 0.0, 0)  # the sums since the start

    def step_done(self, kind: StepKind, snapshot: MemorySnapshot, seconds: float) -> StepCost:
        """To be called after every step, with memory as it is then."""
        cost = StepCost(
            seconds=seconds,
            stall_seconds=snapshot.stall_seconds - self._before.stall_seconds,
            misses=snapshot.expert_misses - self._before.misses,
            late_seconds=snapshot.late_seconds - self._before.late_seconds,
            num_late=snapshot.prefetches_late - self._before.num_late,
            load_seconds=snapshot.load_seconds - self._before.load_seconds,
            saved_loads=self._saved_loads(snapshot.packed_hits),
        )
        self._before = StepCost(
            seconds=0.0,
            stall_seconds=snapshot.stall_seconds,
            misses=snapshot.expert_misses,
            late_seconds=snapshot.late_seconds,
            num_late=snapshot.prefetches_late,
            load_seconds=snapshot.load_seconds,
        )
        self._packed_hits = snapshot.packed_hits
        self._times.note_loads(
            cost.num_loads - cost.num_late,
            waited_seconds=cost.stall_seconds - cost.late_seconds,
            link_seconds=cost.load_seconds,
        )
        compute_seconds = cost.seconds - cost.stall_seconds
        if kind.num_decoding:
            self._times.note_decode(kind.num_decoding, compute_seconds, cost.num_loads)
        elif (
            kind.num_prefill_tokens
        ):  # a row that decodes beside prompts is computed as one token more
            num_tokens = kind.num_prefill_tokens + len(kind.decoding)
            self._times.note_prefill(num_tokens, compute_seconds, cost.num_loads)
        return cost

    def _saved_loads(self, packed_hits: int) -> float:
        return (1 - self._decode_ratio()) * (packed_hits - self._packed_hits)

    def costs(self, snapshot: MemorySnapshot) -> StepCosts:
        """What the scheduler may reckon with for the next steps, with memory as it is."""
        absent = max(0, self._num_experts - snapshot.expert_frames)
        return self._times.costs(absent_experts=absent)

    def new_price(self) -> Price | None:
        """What memory should reckon with from now on; None if that has hardly changed."""
        price = Price(
            nanoseconds(self._times.load_seconds, self._price.expert_nanoseconds),
            nanoseconds(self._times.prefill_token_seconds, self._price.token_nanoseconds),
        )
        if not any(map(is_new, price, self._price)):
            return None
        self._price = price
        return price


def nanoseconds(measured_seconds: float | None, otherwise: int) -> int:
    return otherwise if measured_seconds is None else max(1, round(1e9 * measured_seconds))


def is_new(price: int, before: int) -> bool:
    return not before / PRICE_CHANGE <= price <= before * PRICE_CHANGE
