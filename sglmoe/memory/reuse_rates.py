"""How likely an idle cached prefix is to be found again, learned from those that were and were not.

Idle pages are told apart by how often requests have found them and by how long they have been idle.
Evicted ones go on being counted: that nobody came back for them is known of them too, and that
somebody did as long as `ghost_prefixes` remembers them.
"""

import math
from collections import deque

# Found never, once, more often.
NUM_CLASSES = 3
# Ages are binned by powers of two: bin b is the 2^b steps from 2^b - 1 on; what is older is in the last.
NUM_AGES = 20

# A guess that the first observations correct, as much as so many pages would. The chance to be found
# within one bin of ages is the same for each, as idle times without a typical length have it.
PRIOR_PAGES = (
    4.0  # of 2 to 16, the best on the reference traces; beyond, nothing is learned in time
)
PRIOR_CHANCE = (0.05, 0.15, 0.3)  # arbitrary, by class
# Arbitrary: what a bin has seen counts half from so many pages on, so that old habits are forgotten.
MAX_PAGES = 4096.0
# Arbitrary: of more steps than so many nobody waits for the oldest any longer; each takes about 200 bytes.
MAX_STARTS = 32768
# So often is the table of rates made anew, in up to 0.2 ms. With 64, conversations whose next turn comes
# after 100 steps lose 5 % of what caching saves them (eval/traces/turns-4, 40 % of the frames).
STEPS_BETWEEN_TABLES = 8
# Arbitrary: of so few pages that go on being idle nothing more is gained.
LEAST_SURVIVAL = 1e-6


class _Idle:
    """Pages of one class that became idle in the same step, and nobody has found since."""

    __slots__ = ("num_pages", "since")

    def __init__(self, since: int):
        self.since = since
        self.num_pages = 0


class ReuseRates:
    """Counts page-steps of idleness and reuses by class and age. `step` never falls."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything, and begin to count steps anew."""
        self.step = 0
        self._exposure = [[0.0] * NUM_AGES for _ in range(NUM_CLASSES)]  # page-steps
        self._reuses = [[0.0] * NUM_AGES for _ in range(NUM_CLASSES)]  # pages
        self._idle: list[list[deque[_Idle]]] = [
            [deque() for _ in range(NUM_AGES - 1)] for _ in range(NUM_CLASSES)
        ]
        self._by_start: list[dict[int, _Idle]] = [{} for _ in range(NUM_CLASSES)]
        self._table = self._new_table()

    def begin_step(self) -> None:
        """Let one step pass for all that is idle."""
        self.step += 1
        for class_, by_age in enumerate(self._idle):
            for age, queue in enumerate(by_age):
                if queue and queue[0].since <= self.step - (2 << age) + 1:
                    self._let_age(class_, age, queue)
        if self.step % STEPS_BETWEEN_TABLES == 0:
            self._table = self._new_table()

    def idle(self, num_uses: int, num_pages: int) -> None:
        """These pages, found `num_uses` times so far, are not in use from now on."""
        class_ = class_of(num_uses)
        started = self._by_start[class_].get(self.step)
        if started is None:
            started = self._by_start[class_][self.step] = _Idle(self.step)
            self._idle[class_][0].append(started)
            if len(self._by_start[class_]) > MAX_STARTS:
                self._give_up_oldest(class_)
        started.num_pages += num_pages

    def reuse(self, num_uses: int, since: int, num_pages: int) -> None:
        """Of the pages that were idle since that step, found `num_uses` times before, somebody has
        found so many."""
        class_ = class_of(num_uses)
        started = self._by_start[class_].get(since)
        if started is None or started.num_pages < num_pages:
            return  # too long ago to be kept
        started.num_pages -= num_pages
        age = age_of(self.step - since)
        self._reuses[class_][age] += num_pages
        self._expose(class_, age, num_pages * (self.step - since - (1 << age) + 1.5))

    def rate(self, num_uses: int, since: int) -> float:
        """Reuses of a page to be expected in a step if it is kept as long as that pays: the Gittins
        index of its idle time."""
        return self._table[class_of(num_uses)][age_of(self.step - since)]

    def _let_age(self, class_: int, age: int, queue: deque[_Idle]) -> None:
        """Move those on that have outgrown this bin of ages; the last bin has no end, and none is kept there."""
        while queue and queue[0].since <= self.step - (2 << age) + 1:
            idle = queue.popleft()
            self._expose(class_, age, idle.num_pages * (1 << age))
            if idle.num_pages and age + 1 < len(self._idle[class_]):
                self._idle[class_][age + 1].append(idle)
            else:
                del self._by_start[class_][idle.since]

    def _give_up_oldest(self, class_: int) -> None:
        age = max(age for age, queue in enumerate(self._idle[class_]) if queue)
        oldest = self._idle[class_][age].popleft()
        self._expose(class_, age, oldest.num_pages * (self.step - oldest.since - (1 << age) + 1))
        del self._by_start[class_][oldest.since]

    def _expose(self, class_: int, age: int, page_steps: float) -> None:
        self._exposure[class_][age] += page_steps
        if self._exposure[class_][age] > MAX_PAGES * (1 << age):
            self._exposure[class_][age] /= 2
            self._reuses[class_][age] /= 2

    def _new_table(self) -> list[list[float]]:
        return [self._rates(class_) for class_ in range(NUM_CLASSES)]

    def _rates(self, class_: int) -> list[float]:
        chance = PRIOR_CHANCE[class_]
        hazards = [
            (self._reuses[class_][age] + PRIOR_PAGES * chance)
            / (self._exposure[class_][age] + PRIOR_PAGES * (1 << age))
            for age in range(NUM_AGES)
        ]
        return gittins_indices(hazards)


def gittins_indices(hazards: list[float]) -> list[float]:
    """By bin of ages: the most reuses per step that keeping a page until some later age would bring.

    `hazards`: reuses per page and step in each bin. An index is the supremum over the stopping age
    of expected reuses / expected steps (Gittins 1979).
    """
    chances = [1 - math.exp(-hazard * (1 << age)) for age, hazard in enumerate(hazards)]
    indices = [0.0] * len(hazards)
    for start in range(len(hazards)):
        left, reuses, steps, best = 1.0, 0.0, 0.0, 0.0
        for age in range(start, len(hazards)):
            reuses += left * chances[age]
            steps += left * chances[age] / hazards[age]
            left *= 1 - chances[age]
            best = max(best, reuses / steps)
            if left < LEAST_SURVIVAL:
                break
        indices[start] = best
    return indices


def class_of(num_uses: int) -> int:
    return min(num_uses, NUM_CLASSES - 1)


def age_of(num_steps: int) -> int:
    """The bin of an idle time."""
    return min((num_steps + 1).bit_length() - 1, NUM_AGES - 1)
