"""Other batches of the requests of a routing trace: who decodes together, with the routing that each of them had.

A request's tokens and their experts do not depend on who shares its steps, so those of a trace can be run in other
company. So many run at once, others wait; whoever is admitted has its prompt computed in the next pass, whole.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.prediction.trace import Kind, Trace
from sglmoe.scheduler.affinity import (
    NUM_CONSIDERED,
    SKETCH_BITS,
    Sketch,
    Waiting,
    admission_order,
    sketch_of,
)
from sglmoe.scheduler.halves import RecentUses, Turns, num_activated, pack, split

Tokens = npt.NDArray[np.intp]  # numbers of tokens of a `Library`


class Course(NamedTuple):
    """A request of a trace."""

    tokens: Tokens  # by position
    num_prompt: int  # of these


class Library(msgspec.Struct, frozen=True, eq=False):
    """The tokens of traces of one model, and what became of them."""

    traces: list[Trace]
    courses: list[Course]
    used: npt.NDArray[np.bool_]  # [T, layers, experts]

    def column(self, name: str, tokens: Tokens) -> npt.NDArray[Any]:
        column: npt.NDArray[Any] = np.concatenate([getattr(trace, name) for trace in self.traces])
        return column[tokens]


def library_of(traces: Sequence[Trace]) -> Library:
    courses: list[Course] = []
    first = 0
    for trace in traces:
        courses += [
            Course(course.tokens + first, course.num_prompt) for course in courses_of(trace)
        ]
        first += len(trace.token_ids)
    info = traces[0].info
    used = np.zeros((first, info.num_layers, info.num_experts), np.bool_)
    expert_ids = np.concatenate([trace.expert_ids for trace in traces])
    tokens, layers = np.arange(first)[:, None, None], np.arange(info.num_layers)[None, :, None]
    used[tokens, layers, expert_ids] = True
    return Library(list(traces), courses, used)


def courses_of(trace: Trace) -> Iterator[Course]:
    """Requests that decoded at least one token. Of a position that was computed twice the last time counts."""
    places: dict[int, dict[int, int]] = defaultdict(dict)  # owner -> position -> token
    first_decoded: dict[int, int] = {}
    for step in range(trace.num_steps):
        start, stop = trace.step_bounds[step : step + 2].tolist()
        owners, counts = np.unique(trace.owners[start:stop], return_counts=True)
        single = set(owners[counts == 1].tolist())
        for token in range(start, stop):
            owner, position = int(trace.owners[token]), int(trace.positions[token])
            if owner in single and owner in places:
                first_decoded.setdefault(owner, position)
            places[owner][position] = token
    for owner, by_position in places.items():
        if owner in first_decoded:
            positions = sorted(by_position)
            tokens = np.array([by_position[position] for position in positions], np.intp)
            yield Course(tokens, sum(p < first_decoded[owner] for p in positions))


# ------------------------------------------------------------------------------------------------------------- running


@dataclass(slots=True, eq=False)
class Running:
    """A request on its way."""

    rid: str
    course: Course
    num_computed: int = 0  # of its tokens
    last_step: int = -1

    @property
    def is_over(self) -> bool:
        return self.num_computed == len(self.course.tokens)

    def next_tokens(self) -> Tokens:
        """Its prompt, or one token."""
        stop = self.num_computed + 1 if self.num_computed else self.course.num_prompt
        return self.course.tokens[self.num_computed : stop]


class Pass(NamedTuple):
    """One step: tokens by request."""

    rows: list[tuple[str, Tokens]]
    is_decode: bool


@dataclass(slots=True)
class Schedule:
    """Passes, and He's objective for every round of two halves."""

    passes: list[Pass] = field(default_factory=list)
    foreseen: list[tuple[int, int]] = field(default_factory=list)  # together, in halves
    longest_wait: int = 0  # passes between two tokens of a request


class Scheme(NamedTuple):
    """How batches are made. `window`: steps behind that say what a request will use; 0: its next ones are known."""

    name: str
    share_running: float = 1.0  # of those who could
    turn_steps: int = 0  # 0: all decode together
    split_by: str = "affinity"  # or "chance"
    window: int = 8
    admit: str = "queue"  # or "experts", "words": who is like those that run
    num_considered: int = NUM_CONSIDERED  # of the queue, at most the product's


def schedule(
    library: Library, queue: Sequence[Course], scheme: Scheme, *, num_running: int, seed: int
) -> Schedule:
    """Until the queue is empty: what comes then has fewer and fewer requests, under every scheme."""
    made = Schedule()
    waiting = list(queue)
    admit = Admission(library, scheme.admit, scheme.num_considered)
    halving = Halving(library, scheme, made, seed=seed) if scheme.turn_steps else None
    most = max(1, round(num_running * scheme.share_running))
    running: list[Running] = []
    number = 0
    while True:
        newcomers = []
        while len(running) < most and waiting:
            newcomers.append(Running(str(number), admit.take(waiting, running)))
            running.append(newcomers[-1])
            number += 1
        if len(running) < most:
            return made
        if newcomers:
            advance(made, newcomers, is_decode=False)
        decoding = halving.next_step(running) if halving else running
        advance(made, decoding, is_decode=True)
        running = [request for request in running if not request.is_over]


def advance(made: Schedule, requests: Sequence[Running], *, is_decode: bool) -> None:
    step = len(made.passes)
    rows = []
    for request in requests:
        tokens = request.next_tokens()
        rows.append((request.rid, tokens))
        request.num_computed += len(tokens)
        if is_decode and request.last_step >= 0:
            made.longest_wait = max(made.longest_wait, step - request.last_step)
        request.last_step = step
    made.passes.append(Pass(rows, is_decode))


class Halving:
    """Splits those who run in two, round by round."""

    def __init__(self, library: Library, scheme: Scheme, made: Schedule, *, seed: int) -> None:
        self._library = library
        self._scheme = scheme
        self._made = made
        self._random = random.Random(seed)
        self._turns = Turns(scheme.turn_steps)

    def next_step(self, running: list[Running]) -> list[Running]:
        if self._turns.round_is_over:
            self._begin_round(running)
        decoding = set(self._turns.next_step([request.rid for request in running]))
        return [request for request in running if request.rid in decoding]

    def _begin_round(self, running: list[Running]) -> None:
        packed = self.expected(running).packed
        if self._scheme.split_by == "chance":
            order = self._random.sample(range(len(running)), len(running))
            middle = (len(running) + 1) // 2
            first, second = np.array(order[:middle]), np.array(order[middle:])
        else:
            first, second = split(packed)
        together = num_activated(packed, np.arange(len(running)))
        in_halves = num_activated(packed, first) + num_activated(packed, second)
        self._made.foreseen.append((together, in_halves))
        self._turns.begin_round(
            *([running[number].rid for number in half.tolist()] for half in (first, second))
        )

    def expected(self, running: list[Running]) -> RecentUses:
        """What they used last, or will use in their next turn."""
        window = self._scheme.window
        counts = []
        for request in running:
            done, tokens = request.num_computed, request.course.tokens
            shown = tokens[max(0, done - window) : done]
            if not window:
                shown = tokens[done : done + self._scheme.turn_steps]
            counts.append(self._library.used[shown].sum(axis=0, dtype=np.uint8))
        return RecentUses(np.stack(counts), window or self._scheme.turn_steps)


class Admission:
    """Who of the first in the queue is next, by the product's rule."""

    def __init__(self, library: Library, by: str, num_considered: int) -> None:
        self._library = library
        self._by = by
        self._num_considered = num_considered
        self._num_overtaken: dict[int, int] = defaultdict(int)  # by id() of the course's tokens
        self._sketches: dict[int, Sketch] = {}
        self._token_ids = library.column("token_ids", np.arange(len(library.used)))

    def take(self, waiting: list[Course], running: list[Running]) -> Course:
        """Out of the queue."""
        if self._by == "queue":
            return waiting.pop(0)
        candidates = [
            Waiting(self._sketch(course), self._num_overtaken[id(course.tokens)])
            for course in waiting[: self._num_considered]
        ]
        present = [self._sketch(request.course) for request in running]
        index = admission_order(candidates, present, num_places=1)[0]
        for overtaken in waiting[:index]:
            self._num_overtaken[id(overtaken.tokens)] += 1
        return waiting.pop(index)

    def _sketch(self, course: Course) -> Sketch:
        """Which tokens are in a prompt, or which experts it takes more often than the average."""
        key = id(course.tokens)
        if key not in self._sketches:
            prompt = course.tokens[: course.num_prompt]
            if self._by == "words":
                self._sketches[key] = sketch_of(self._token_ids[prompt].tolist())
            else:
                share = self._library.used[prompt].mean(axis=0)
                often = share > self._library.used.mean()
                bits = np.zeros(SKETCH_BITS, np.bool_)
                bits[: often.size] = often.ravel()
                self._sketches[key] = pack(bits[np.newaxis])[0]
        return self._sketches[key]


# ------------------------------------------------------------------------------------------------------------- a trace


def as_trace(library: Library, made: Schedule) -> Trace:
    """The schedule as if a server had recorded it; memory's own operations are left out."""
    tokens = np.concatenate([tokens for its in made.passes for _, tokens in its.rows])
    owners = np.concatenate(
        [np.full(len(t), int(rid)) for its in made.passes for rid, t in its.rows]
    )
    sizes = [sum(len(tokens) for _, tokens in its.rows) for its in made.passes]
    bounds = np.cumsum([0, *sizes])
    template = library.traces[0]
    last_step: dict[int, int] = {}
    for step, its in enumerate(made.passes):
        last_step |= {int(rid): step for rid, _ in its.rows}
    ends: dict[int, list[int]] = defaultdict(list)
    for owner, step in last_step.items():
        ends[step].append(owner)
    operations = []
    for step in range(len(made.passes)):
        operations.append((Kind.FORWARD, step, bounds[step], bounds[step + 1], 0))
        operations += [(Kind.RELEASE, owner, 0, 0, 0) for owner in ends[step]]
    return Trace(
        info=msgspec.structs.replace(template.info, namespaces=[""] * (1 + int(owners.max()))),
        operations=np.array(operations, np.int32),
        request_tokens=np.empty(0, np.int32),
        request_bounds=np.zeros(2 + int(owners.max()), np.int64),
        token_ids=library.column("token_ids", tokens),
        positions=library.column("positions", tokens),
        owners=owners.astype(np.int32),
        expert_ids=library.column("expert_ids", tokens),
        probabilities=library.column("probabilities", tokens),
        step_bounds=bounds,
        step_seconds=np.zeros(len(made.passes), np.float32),
    )
