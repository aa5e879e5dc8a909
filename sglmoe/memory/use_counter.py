"""How often each expert is used in decode steps, resident or not."""

from collections.abc import Callable, Iterator

import numpy as np

from sglmoe.memory.experts import ExpertIds
from sglmoe.memory.residency import ExpertUses

# Arbitrary: a decode step so many steps ago counts half.
HALF_LIFE = 32


Waves = Callable[[int, ExpertIds], Iterator[ExpertIds]]  # `MemoryManager.waves`


class UseCounter:
    """Shares of decode steps that used an expert; recent steps weigh more.

    Instead of letting old counts decay, each step weighs more than the one before: an expert that is
    not used costs nothing.
    """

    def __init__(self, num_layers: int, num_experts: int):
        self._counts = np.zeros((num_layers, num_experts))
        self._rows = 0.0  # weighted sum
        self._steps = 0.0  # weighted number
        self._weight = 1.0  # of the next step
        self._used: list[tuple[int, ExpertIds]] = []  # in the step that runs

    def counting(self, waves: Waves) -> Waves:
        """The same waves, and what they are asked for is counted."""

        def counted(layer: int, experts: ExpertIds) -> Iterator[ExpertIds]:
            self._used.append((layer, experts))
            return waves(layer, experts)

        return counted

    def end_step(self, num_decoding: int) -> None:
        """The step decoded so many requests; 0 if it did anything else: it doesn't count then."""
        used, self._used = self._used, []
        if not num_decoding:
            return
        if used:
            first = np.array([layer for layer, _ in used]) * self._counts.shape[1]
            numbers = np.concatenate([experts for _, experts in used])
            numbers += np.repeat(first, [len(experts) for _, experts in used])
            self._counts.reshape(-1)[numbers] += self._weight
        self._rows += self._weight * num_decoding
        self._steps += self._weight
        self._weight *= 0.5 ** (-1 / HALF_LIFE)
        if self._weight > 1e100:
            self._rescale()

    def uses(self) -> ExpertUses:
        """See `ExpertUses`. At least one decode step must have ended."""
        return ExpertUses(self._counts / self._steps, self._rows / self._steps)

    def _rescale(self) -> None:
        self._counts /= self._weight
        self._rows /= self._weight
        self._steps /= self._weight
        self._weight = 1.0
