"""How often each expert is used, resident or not."""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from sglmoe.memory.experts import ExpertIds
from sglmoe.memory.residency import ExpertUses
from sglmoe.memory.step_times import DecayedRatio

# Arbitrary for a decode step to count half after so many; what it means for evictions: `expert_values`.
HALF_LIFE_STEPS = 32
# Steps are weighted by when they were, the latest most; weights are scaled back beyond this.
MAX_WEIGHT = 2.0**100

Waves = Callable[[int, ExpertIds], Iterator[ExpertIds]]  # `MemoryManager.waves`


class UseShares:
    """Shares of steps that used an expert; recent steps weigh more.

    Instead of letting old counts decay, each step weighs more than the one before: nothing has to be
    done for experts that are not used.
    """

    def __init__(self, shape: tuple[int, int]):
        self.num_steps = 0.0  # weighted, as the next; the step that runs would count 1
        self._counts: npt.NDArray[np.float64] = np.zeros(shape)
        self._used: npt.NDArray[np.bool_] = np.zeros(shape, bool)  # in the step that runs
        self._weight = 1.0  # of the step that runs

    def note(self, layer: int, experts: ExpertIds) -> None:
        """The step that runs uses these."""
        self._used[layer][experts] = True  # half the time of [layer, experts]

    def end_step(self, *, counts: bool = True) -> None:
        if counts:
            self._counts += self._weight * self._used
            self.num_steps = (self.num_steps + 1) * 0.5 ** (1 / HALF_LIFE_STEPS)
            self._weight *= 2 ** (1 / HALF_LIFE_STEPS)
            if self._weight > MAX_WEIGHT:
                self._counts /= self._weight
                self._weight = 1.0
        self._used[:] = False

    def shares(self) -> npt.NDArray[np.float64]:
        """`[num_layers, num_experts]`; at least one step must have ended."""
        shares: npt.NDArray[np.float64] = self._counts / (self._weight * self.num_steps)
        return np.minimum(shares, 1)  # rounding


class UseCounter:
    """Shares of decode steps alone, and how many requests these had."""

    def __init__(self, num_layers: int, num_experts: int):
        self._shares = UseShares((num_layers, num_experts))
        self._rows = DecayedRatio(HALF_LIFE_STEPS)

    def note(self, layer: int, experts: ExpertIds) -> None:
        """The step that runs uses these."""
        self._shares.note(layer, experts)

    def counting(self, waves: Waves) -> Waves:
        """The same waves, and what they are asked for is noted."""

        def counted(layer: int, experts: ExpertIds) -> Iterator[ExpertIds]:
            self.note(layer, experts)
            return waves(layer, experts)

        return counted

    def end_step(self, num_decoding: int) -> None:
        """The step decoded so many requests; 0 if it did anything else: it doesn't count then."""
        self._shares.end_step(counts=bool(num_decoding))
        if num_decoding:
            self._rows.note(num_decoding, 1)

    def uses(self) -> ExpertUses:
        """See `ExpertUses`. At least one decode step must have ended."""
        num_running = self._rows.ratio
        assert num_running is not None, "no decode step has ended"
        return ExpertUses(self._shares.shares(), num_running)
