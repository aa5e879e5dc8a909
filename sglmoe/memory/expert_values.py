"""What each expert is worth, resident or not, as each policy sees it: the lowest goes first."""

from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from sglmoe.config import MemoryPolicy
from sglmoe.memory.eviction import Clock
from sglmoe.memory.experts import ExpertIds
from sglmoe.memory.prices import Prices
from sglmoe.memory.use_counter import UseShares

Values: TypeAlias = npt.NDArray[np.float64]  # [num_layers, num_experts]
Probabilities: TypeAlias = npt.NDArray[np.floating[Any]]  # [num_layers, num_experts]

LEAST_PROBABILITY = 1e-6
# Arbitrary: LRU treats what is at least as likely to be used as if that had happened.
EXPECTED_PROBABILITY = 0.5


class Expected(NamedTuple):
    """What is to come: the rows from `first_layer` on, of this step or of the next one."""

    probabilities: Probabilities
    first_layer: int
    in_next_step: bool

    @classmethod
    def after(cls, layer: int, probabilities: Probabilities) -> "Expected":
        num_layers = len(probabilities)
        return cls(probabilities, (layer + 1) % num_layers, layer + 1 == num_layers)

    def in_step(self) -> "Expected | None":
        """What of it is left when another step begins."""
        return self._replace(in_next_step=False) if self.in_next_step else None


class ExpertValues(Protocol):
    """A policy's memory of uses."""

    def begin_step(self) -> None:
        """What is used from now on is used in another forward pass."""

    def use(self, layer: int, experts: ExpertIds) -> None:
        """These distinct experts are used now; they and the layer are the last that were."""

    def expect(self, layer: int, probabilities: Probabilities) -> None:
        """How likely this step is to use each expert of the layers after `layer`, or of all layers if
        that is -1; after the last layer: how likely the next step is.

        That holds until the step in question ends, or until it is said again. Not to be changed
        meanwhile.
        """

    def now(self) -> Values:
        """The values as of now. Not to be kept or changed."""

    def demand(self) -> Values:
        """How much each is wanted, whatever runs now: only its order counts. Not to be changed.

        Another thread may ask: it sees what is true now and then, and changes nothing.
        """

    def clear(self) -> None:
        """Forget all uses."""


class LastUse:
    """LRU: when an expert was used last.

    What is expected in the layers ahead counts as used now. So there are two tiers, and who was used
    recently or soon will be goes after all others (ExpertFlow, Shen et al., arXiv 2510.26730).
    """

    def __init__(self, shape: tuple[int, int], clock: Clock):
        self._values: Values = np.zeros(shape)
        self._clock = clock
        self._layer = -1  # that was used last in this step
        self._expected: Expected | None = None

    def begin_step(self) -> None:
        self._expected = self._expected and self._expected.in_step()
        self._layer = -1

    def use(self, layer: int, experts: ExpertIds) -> None:
        self._values[layer, experts] = self._clock.now
        self._layer = layer

    def expect(self, layer: int, probabilities: Probabilities) -> None:
        self._expected = Expected.after(layer, probabilities)

    def now(self) -> Values:
        if self._expected is None:
            return self._values
        first = first_ahead(self._expected, self._layer)
        values = self._values.copy()
        is_likely = self._expected.probabilities[first:] >= EXPECTED_PROBABILITY
        values[first:][is_likely] = self._clock.now
        return values

    def demand(self) -> Values:
        return self._values

    def clear(self) -> None:
        self._values[:] = 0
        self._expected = None


class UseCount:
    """LFU: how often an expert was used since the start.

    Times the probability with which it is expected: the highest 1 / (p * freq) goes first (FineMoE,
    arXiv 2502.05370, section 4). What was expected of layers behind holds until it is said anew.
    """

    def __init__(self, shape: tuple[int, int]):
        self._values: Values = np.zeros(shape)
        self._probabilities: Values | None = None

    def begin_step(self) -> None:
        """Steps make no difference."""

    def use(self, layer: int, experts: ExpertIds) -> None:
        self._values[layer, experts] += 1

    def expect(self, layer: int, probabilities: Probabilities) -> None:
        if self._probabilities is None:
            self._probabilities = np.ones_like(self._values)
        first = Expected.after(layer, probabilities).first_layer
        self._probabilities[first:] = np.maximum(probabilities[first:], LEAST_PROBABILITY)

    def now(self) -> Values:
        if self._probabilities is None:
            return self._values
        return self._values * self._probabilities

    def demand(self) -> Values:
        return self._values

    def clear(self) -> None:
        self._values[:] = 0
        self._probabilities = None


class NextUse:
    """Seconds saved per byte and step: what a load costs over how long it is until the next use.

    An expert that is used in a step with probability p is expected in (1 - p) / p steps from when its
    layer comes next, and that is a part of a step away: the layers ahead of it, in a circle. What
    was just used is therefore the farthest away of all that are used as often. p is the share of
    steps in which it was used, recent ones weighing more: half the demo model's experts in frames,
    hits on average over the reference traces are 67 % with a half-life of 16, 32 or 64 steps alike.
    Where this step is expected to use it with probability q, that is (1 - q) / p steps.
    """

    def __init__(self, shape: tuple[int, int], prices: Prices):
        self._shape = shape
        self._prices = prices
        self._uses = UseShares(shape)
        self._layer = -1  # that was used last in this step
        # From when the layer comes next; None until somebody asks in this step.
        self._steps: Values | None = None
        self._probability: Values = np.empty(shape)  # from which _steps was made
        self._expected: Expected | None = None

    def begin_step(self) -> None:
        self._expected = self._expected and self._expected.in_step()
        if self._layer < 0:
            return  # nothing was used since the last one
        self._uses.end_step()
        self._layer = -1
        self._steps = None

    def use(self, layer: int, experts: ExpertIds) -> None:
        self._uses.note(layer, experts)
        self._layer = layer

    def expect(self, layer: int, probabilities: Probabilities) -> None:
        self._expected = Expected.after(layer, probabilities)

    def now(self) -> Values:
        layers = np.arange(self._shape[0])
        ahead = ((layers - self._layer - 1) % self._shape[0] + 1) / self._shape[0]
        steps = self._steps_from_its_layer() + ahead[:, np.newaxis]
        if self._expected is not None:
            first = first_ahead(self._expected, self._layer)
            unlikely = 1 - self._expected.probabilities[first:]
            steps[first:] = unlikely / self._probability[first:] + ahead[first:, np.newaxis]
        values: Values = self._prices.expert_byte / steps
        return values

    def demand(self) -> Values:
        return self.probability()

    def probability(self) -> Values:
        """Of being used in a step, for every expert, as of the beginning of this step."""
        num_steps = self._uses.num_steps
        if not num_steps:
            return np.full(self._shape, LEAST_PROBABILITY)
        shares = self._uses.shares()
        # One more step like the average one, so that none is sure and none impossible.
        probability: Values = (shares * num_steps + shares.mean()) / (num_steps + 1)
        return probability.clip(LEAST_PROBABILITY, 1)

    def clear(self) -> None:
        self._uses = UseShares(self._shape)
        self._layer = -1
        self._steps = self._expected = None

    def _steps_from_its_layer(self) -> Values:
        if self._steps is None:
            probability = self._probability = self.probability()
            self._steps = (1 - probability) / probability
        return self._steps


def first_ahead(expected: Expected, layer: int) -> int:
    """The first row that is still to come, after that layer was used."""
    return expected.first_layer if expected.in_next_step else max(expected.first_layer, layer + 1)


def values_for(
    policy: MemoryPolicy, shape: tuple[int, int], *, clock: Clock, prices: Prices
) -> ExpertValues:
    """`shape`: layers and experts in each."""
    match policy:
        case MemoryPolicy.COST_AWARE:
            return NextUse(shape, prices)
        case MemoryPolicy.LFU:
            return UseCount(shape)
        case MemoryPolicy.LRU | MemoryPolicy.STATIC:
            return LastUse(shape, clock)
