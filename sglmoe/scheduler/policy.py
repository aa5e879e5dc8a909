"""What the next step should do: which requests to admit, advance and preempt. Pure functions over immutable views.

Knows neither the worker nor SGLang. Prefill goes first, as in SGLang: a step decodes only when nothing can be prefilled,
or does both with `mix_decode`. Where experts are streamed, prompts may wait until they fill a pass (`passes.py`). Memory is
estimated in pages and may be wrong; the worker refuses what does not fit.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec

from sglmoe.protocol import Row, StepCosts, StepPlan
from sglmoe.scheduler.passes import Held, Pass, PassSettings, pass_tokens, should_wait
from sglmoe.units import ceil_div

# Beyond so many queued requests SGLang orders by arrival instead of matching prefixes; so do we.
MAX_PREFIX_MATCHES = 128
# Arbitrary: how many of the next requests are asked for their cached prefix, so that chunks are filled with real work.
NUM_PROBES = 16
# SGLang's SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION: a request is expected to generate no more than this.
MAX_EXPECTED_TOKENS = 4096

UNKNOWN_COSTS = StepCosts()
NOT_HELD = Held()

Order = Literal["fcfs", "lpm", "lof", "random"]


class PolicySettings(msgspec.Struct, frozen=True):
    """The flags that steer scheduling. `preemption_threshold` is None where priorities preempt nobody."""

    max_running: int
    max_prefill_tokens: int
    chunk_tokens: int | None = None  # None: prompts are never cut
    order: Order = "fcfs"
    mix_decode: bool = False
    preemption_threshold: int | None = None
    passes: PassSettings = PassSettings()
    expert_affinity: bool = False  # of those that wait, admit who is like those that run


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A request as it will be when the plans in flight have run."""

    rid: str
    num_tokens: int  # prompt and output
    computed_tokens: int  # of these, with KV
    new_tokens_left: int  # that it may still ask for
    settled_tokens: int = 0  # of `computed_tokens`, already counted in the snapshot's locked pages
    cached_tokens: int | None = (
        None  # found by a probe, if it was asked; a queued request can start from there
    )
    rank: int = 0  # by priority: lower goes first
    arrival: int = 0
    waited_seconds: float = 0.0  # since it came; 0 when it has its first token

    @property
    def remaining_tokens(self) -> int:
        """KV to compute until its next token; 1 when it decodes."""
        return self.num_tokens - max(self.computed_tokens, self.cached_tokens or 0)


class Memory(msgspec.Struct, frozen=True):
    """What the last snapshot said, and how much of their allowance running requests are expected to use."""

    available_pages: int
    page_tokens: int
    new_token_ratio: float

    def pages(self, num_tokens: float) -> int:
        return ceil_div(int(num_tokens), self.page_tokens)

    def pages_to_finish(self, running: Iterable[Candidate]) -> int:
        """Pages that running requests will still take, those of plans in flight included."""
        ratio, page_tokens, num_pages = self.new_token_ratio, self.page_tokens, 0
        for candidate in running:  # hundreds in each plan, so without a call for each
            left = candidate.new_tokens_left
            expected = ratio * (left if left < MAX_EXPECTED_TOKENS else MAX_EXPECTED_TOKENS)
            num_pages -= -int(candidate.num_tokens + expected) // page_tokens
            num_pages += -candidate.settled_tokens // page_tokens
        return num_pages

    def pages_to_admit(self, queued: Candidate) -> int:
        return self.pages(queued.num_tokens + min(queued.new_tokens_left, MAX_EXPECTED_TOKENS))


class PrefillBudget:
    """The prompt tokens that one step may compute, beside the rows that decode in it."""

    def __init__(self, settings: PolicySettings, costs: StepCosts, *, num_decoding: int) -> None:
        self._chunk_tokens = settings.chunk_tokens
        most = settings.max_prefill_tokens
        num_tokens = pass_tokens(
            min(settings.chunk_tokens or most, most),
            most,
            costs=costs,
            settings=settings.passes,
            num_decoding=num_decoding,
        )
        self._whole = self._left = num_tokens - (num_decoding if settings.mix_decode else 0)
        self._untouched = True

    def take(self, remaining_tokens: int) -> int:
        """Tokens granted, 0 if none are. Whole prompts only, if they must not be cut; the first one always fits then."""
        granted = min(remaining_tokens, self._left)
        if self._chunk_tokens is None and granted < remaining_tokens:
            granted = remaining_tokens if self._untouched else 0
        if granted <= 0:
            return 0
        self._left -= granted
        self._untouched = False
        return granted

    @property
    def num_taken(self) -> int:
        return self._whole - self._left

    @property
    def exhausted(self) -> bool:
        return self._left <= 0


class Decision(NamedTuple):
    """What the next step does."""

    plan: StepPlan
    num_held: int  # requests that could have begun, but wait for a fuller pass
    only_prompts: bool  # are computed in it


def plan_step(
    *,
    step_id: int,
    running: Sequence[Candidate],
    queued: Sequence[Candidate],
    memory: Memory,
    settings: PolicySettings,
    drop: tuple[str, ...] = (),
    preempt: tuple[str, ...] = (),
    costs: StepCosts = UNKNOWN_COSTS,
    held: Held = NOT_HELD,
    after_pass: bool = False,
) -> Decision:
    """The step to run after those in flight; both sequences come most senior first. May be empty.

    `drop` and `preempt` are passed on; the requests that have to go for others are appended to `preempt`. `after_pass`: the
    step before computed prompts and nothing else, so that a target between tokens asks for one that decodes.
    """
    decoding, prefilling = _split(running)
    if after_pass and decoding and settings.passes.itl_seconds is not None:
        prefilling, queued = [], ()
    budget = PrefillBudget(settings, costs, num_decoding=len(decoding))
    prefill_rows = list(_grant(prefilling, budget))
    waiting = order_queue(queued, settings.order, seed=step_id)
    admitted, preempted = _admit(waiting, running, budget=budget, memory=memory, settings=settings)
    num_held = 0
    if admitted and not (prefilling or preempted):
        waits = tuple(candidate.waited_seconds for candidate in waiting[: len(admitted)])
        ready = Pass(budget.num_taken, len(decoding), waits)
        if should_wait(ready, costs=costs, held=held, settings=settings.passes):
            num_held, admitted = len(admitted), []
    prefill_rows += admitted
    decode_rows = [Row(c.rid, 1) for c in decoding if c.rid not in preempted]
    if prefill_rows and not settings.mix_decode:
        decode_rows = []
    plan = StepPlan(
        step_id=step_id,
        rows=(*decode_rows, *(row for row in prefill_rows if row.rid not in preempted)),
        drop=drop,
        preempt=(*preempt, *preempted),
        probe=_probes(waiting[len(admitted) :], settings, admitting=bool(admitted)),
    )
    return Decision(plan, num_held, bool(prefill_rows) and not decode_rows)


def _split(running: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """Those that decode, and those whose prompts are being computed."""
    decoding: list[Candidate] = []
    prefilling: list[Candidate] = []
    for candidate in running:
        if candidate.new_tokens_left > 0:
            is_whole = candidate.num_tokens - candidate.computed_tokens == 1
            (decoding if is_whole else prefilling).append(candidate)
    return decoding, prefilling


def order_queue(queued: Sequence[Candidate], order: Order, *, seed: int) -> list[Candidate]:
    """Queued requests in the order in which to admit them; `queued` comes by rank and arrival."""
    candidates = list(queued)
    match order:
        case "lpm" if len(candidates) <= MAX_PREFIX_MATCHES:
            candidates.sort(key=lambda candidate: (candidate.rank, -(candidate.cached_tokens or 0)))
        case "lof":
            candidates.sort(key=lambda candidate: (candidate.rank, -candidate.new_tokens_left))
        case "random":
            random.Random(seed).shuffle(candidates)
        case _:
            pass
    return candidates


def _grant(prefilling: Sequence[Candidate], budget: PrefillBudget) -> Iterator[Row]:
    for candidate in prefilling:
        if num_tokens := budget.take(candidate.remaining_tokens):
            yield Row(candidate.rid, num_tokens)


def _admit(
    waiting: Sequence[Candidate],
    running: Sequence[Candidate],
    *,
    budget: PrefillBudget,
    memory: Memory,
    settings: PolicySettings,
) -> tuple[list[Row], tuple[str, ...]]:
    """Rows for requests from the queue, strictly in its order, and the requests that have to go for them."""
    if not waiting:
        return [], ()
    free_pages = memory.available_pages - memory.pages_to_finish(running)
    num_running = len(running)
    rows: list[Row] = []
    victims: list[Candidate] = []
    for candidate in waiting:
        if budget.exhausted:
            break
        needed_pages = memory.pages_to_admit(candidate)
        fits = needed_pages <= free_pages or not num_running
        if not fits or num_running >= settings.max_running:
            left = [other for other in running if other not in victims]
            found = _victims(
                candidate,
                left,
                lacking_pages=needed_pages - free_pages,
                memory=memory,
                settings=settings,
            )
            if not found:
                break
            victims += found
            num_running -= len(found)
            free_pages += sum(_pages_freed(victim, memory) for victim in found)
        num_tokens = budget.take(candidate.remaining_tokens)
        if not num_tokens:
            break
        rows.append(Row(candidate.rid, num_tokens))
        free_pages -= needed_pages
        num_running += 1
    return rows, tuple(victim.rid for victim in victims)


def _victims(
    candidate: Candidate,
    running: Sequence[Candidate],
    *,
    lacking_pages: int,
    memory: Memory,
    settings: PolicySettings,
) -> list[Candidate]:
    """The least important running requests whose leaving lets `candidate` in; none if that can't be done."""
    if settings.preemption_threshold is None:
        return []
    victims: list[Candidate] = []
    for other in sorted(running, key=lambda c: (c.rank, c.arrival), reverse=True):
        if other.rank - candidate.rank <= settings.preemption_threshold:
            break
        victims.append(other)
        lacking_pages -= _pages_freed(other, memory)
        if lacking_pages <= 0:
            return victims
    return []


def _pages_freed(victim: Candidate, memory: Memory) -> int:
    return memory.pages(victim.settled_tokens) + memory.pages_to_finish([victim])


def _probes(
    waiting: Sequence[Candidate], settings: PolicySettings, *, admitting: bool
) -> tuple[str, ...]:
    """Whom to ask for cached prefixes: those who may be next, and whoever lpm has to place for the first time."""
    if settings.order == "lpm":
        asked = waiting if admitting else [c for c in waiting if c.cached_tokens is None]
        return tuple(candidate.rid for candidate in asked[:MAX_PREFIX_MATCHES])
    return tuple(candidate.rid for candidate in waiting[:NUM_PROBES]) if admitting else ()


class NewTokenRatio:
    """The share of their allowance that running requests are expected to use: SGLang's `NewTokenRatioTracker`.

    It sinks while memory suffices and jumps up when it did not.
    """

    def __init__(self, *, initial: float, minimum: float, decay: float) -> None:
        self._initial = initial
        self._minimum = minimum
        self._decay = decay
        self.current = initial

    def sink(self) -> None:
        self.current = max(self.current - self._decay, self._minimum)

    def reset(self) -> None:
        self.current = self._initial

    def after_rejection(
        self, *, decoded_tokens: int, allowed_tokens: int, num_running: int
    ) -> None:
        # 20: SGLang's SGLANG_RETRACT_DECODE_STEPS, steps that should run before the next rejection.
        estimate = (decoded_tokens + 20 * num_running) / (allowed_tokens + 1)
        self.current = min(1.0, estimate)
