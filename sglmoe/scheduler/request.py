"""A request and everything that is known of it, enough to give it to a new worker.

Only the scheduler changes a request; the front end reads it and keeps its own place in `Sent`.
"""

from array import array
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from sglmoe.protocol import LogprobSpec, NewRequest, RoutedExperts, RowResult, TokenLogprobs
from sglmoe.scheduler.affinity import Sketch, sketch_of
from sglmoe.scheduler.finish import Decode, FinishReason, StopRules, check_finish
from sglmoe.scheduler.reasoning import ReasoningCounter


class State(Enum):
    PREPARING = "preparing"  # the worker compiles its grammar
    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"


# By these names where hundreds of rows a step ask: finding a member in its class takes 0.15 us, all else of a row 5.
QUEUED, RUNNING = State.QUEUED, State.RUNNING


class Display(msgspec.Struct, frozen=True):
    """How the front end shows a request's output."""

    stream: bool = False
    stream_interval: int = 1
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    flat_top_logprobs: bool = False
    http_worker: str | None = None  # which of several HTTP workers waits for it
    is_health_check: bool = False


@dataclass(slots=True)
class Sent:
    """How much of a request's output has gone to the client."""

    num_tokens: int = 0
    started: bool = False  # the detokenizer has its context
    num_logprobs: int = 0
    input_logprobs: bool = False
    finish: bool = False


@dataclass(slots=True)
class LogprobLists:
    """Log probabilities, position by position, in the lists that SGLang's messages carry."""

    values: list[float | None] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    top_values: list[tuple[float, ...] | None] = field(default_factory=list)
    top_ids: list[tuple[int, ...] | None] = field(default_factory=list)
    picked_values: list[tuple[float, ...] | None] = field(default_factory=list)

    def append(self, token: TokenLogprobs, spec: LogprobSpec) -> None:
        self.values.append(token.logprob)
        self.ids.append(token.token_id)
        if spec.num_top:
            self.top_values.append(token.top_logprobs)
            self.top_ids.append(token.top_ids)
        if spec.token_ids is not None:
            self.picked_values.append(token.picked_logprobs)

    def append_unknown(self, token_id: int, spec: LogprobSpec) -> None:
        """A position without log probabilities: the first one asked for, as in SGLang."""
        self.values.append(None)
        self.ids.append(token_id)
        if spec.num_top:
            self.top_values.append(None)
            self.top_ids.append(None)
        if spec.token_ids is not None:
            self.picked_values.append(None)


@dataclass(slots=True)
class RoutingRecord:
    """Chosen experts of the tokens from `start` on: int32 `[tokens, layers, top_k]` in `ids`."""

    start: int
    num_layers: int = 0
    top_k: int = 0
    ids: bytearray = field(default_factory=bytearray)

    @property
    def num_tokens(self) -> int:
        """Tokens whose experts are known."""
        return len(self.ids) // (4 * self.num_layers * self.top_k) if self.ids else 0

    def put(self, chunk: RoutedExperts, *, end: int) -> None:
        """Take a chunk whose last token is number `end - 1`; what is known already is overwritten."""
        num_tokens, self.num_layers, self.top_k = chunk.shape
        row_bytes = 4 * self.num_layers * self.top_k
        skipped = max(0, self.start - (end - num_tokens))
        first = end - num_tokens + skipped - self.start
        if skipped < num_tokens:
            missing = first * row_bytes - len(self.ids)
            self.ids.extend(bytes(max(0, missing)))
            self.ids[first * row_bytes : (end - self.start) * row_bytes] = chunk.ids[
                skipped * row_bytes :
            ]


@dataclass(slots=True)
class Timing:
    """Readings of the scheduler's clock, in seconds; 0 is "not yet"."""

    queued_at: float = 0.0
    scheduled_at: float = 0.0  # first put into a plan
    first_token_at: float = 0.0
    finished_at: float = 0.0


@dataclass(slots=True, eq=False)
class Request:
    rid: str
    prompt_ids: "array[int]"
    stop: StopRules
    sampling: bytes = b""  # SGLang's SamplingParams; opaque here
    namespace: str = ""
    logprobs: LogprobSpec | None = None
    routed_experts: RoutingRecord | None = None
    reasoning: ReasoningCounter | None = None
    requires_reasoning: bool = False
    has_grammar: bool = False
    priority: int | None = None
    display: Display = field(default_factory=Display)

    state: State = State.QUEUED
    arrival: int = 0  # the order in which the scheduler got its requests
    output_ids: "array[int]" = field(default_factory=lambda: array("q"))
    num_computed: int = 0  # tokens whose KV the worker holds, by its last word
    num_cached: int = 0  # of the prompt, found in the cache at first admission
    probed_cached: int | None = None  # found in the cache while queued; stale
    in_flight: list[int] = field(default_factory=list)  # tokens granted by plans not answered yet
    evicted_step: int = -1  # answers to later steps only tell of KV that it still holds
    num_retractions: int = 0
    num_overtaken: int = 0  # later ones that were admitted before it, for their company
    _sketch: Sketch | None = None
    furthest: int = -1  # the most tokens that had KV at any time; -1 until its grammar is compiled
    num_deaths: int = 0  # of workers that were at work for it, since it got that far
    finish: FinishReason | None = None
    finish_length: int | None = None  # output tokens that count
    input_logprobs: LogprobLists | None = None
    output_logprobs: LogprobLists | None = None
    timing: Timing = field(default_factory=Timing)
    sent: Sent = field(default_factory=Sent)
    num_prompt: int = field(init=False)
    asks_for_more: bool = field(init=False)  # than tokens

    def __post_init__(self) -> None:
        self.num_prompt = len(self.prompt_ids)
        extras = (self.logprobs, self.routed_experts, self.reasoning)
        self.asks_for_more = any(extra is not None for extra in extras)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + len(self.output_ids)

    @property
    def finished(self) -> bool:
        return self.state is State.FINISHED

    @property
    def num_output_tokens(self) -> int:
        """Output tokens up to where it stopped."""
        return len(self.output_ids) if self.finish_length is None else self.finish_length

    @property
    def sketch(self) -> Sketch:
        """Which tokens its prompt has."""
        if self._sketch is None:
            self._sketch = sketch_of(self.prompt_ids)
        return self._sketch

    def expected_progress(self) -> tuple[int, int]:
        """Tokens with KV, and all tokens, when the plans in flight have run without finding anything cached."""
        computed, total = self.num_computed, self.num_prompt + len(self.output_ids)
        for granted in self.in_flight:
            if granted >= total - computed:
                computed, total = total, total + 1
            else:
                computed += granted
        return computed, total

    def lose_memory(self, step_id: int) -> None:
        """Its KV is gone as of this step; it has to be prefilled again."""
        self.num_computed = 0
        self.evicted_step = step_id
        self.num_retractions += 1

    def reached(self, num_computed: int) -> None:
        """It got so far. Further than ever clears it of the deaths before."""
        if num_computed > self.furthest:
            self.furthest = num_computed
            self.num_deaths = 0

    def takes_decoded(self, row: RowResult, step_id: int) -> bool:
        """Take the usual row in: of a running request that got its next token, goes on, and asked for nothing else.

        False for any other row, of which nothing is taken. Of hundreds of rows a step nearly all are
        usual: this comes to the same as all that is done for any row, at half of the time.
        """
        token_id, num_computed, output_ids = row.token_id, row.num_computed, self.output_ids
        num_outputs = len(output_ids)
        if (
            token_id is None
            or num_computed != self.num_computed + 1
            or not num_outputs
            or self.state is not RUNNING
            or step_id < self.evicted_step
            or self.asks_for_more
            or row.grammar_done
            or not self.stop.lets_go_on(token_id, num_outputs + 1)
        ):
            return False
        output_ids.append(token_id)
        self.num_computed = num_computed
        if num_computed > self.furthest:  # `reached`
            self.furthest, self.num_deaths = num_computed, 0
        return True

    def lose_worker(self) -> None:
        """Nobody knows it any more. What is announced to the next worker begins with what was recorded whole."""
        self.in_flight.clear()
        self.probed_cached = None
        if not self._has_prompt_logprobs:
            self.input_logprobs = None

    @property
    def _has_prompt_logprobs(self) -> bool:
        """Whether all that were asked for are here."""
        lists = self.input_logprobs
        if self.logprobs is None or lists is None:
            return False
        return len(lists.values) >= self.num_prompt - self.logprobs.start

    def take_token(
        self, row: RowResult, token_id: int, *, now: float, decode: Decode
    ) -> FinishReason | None:
        """Append a sampled token and what came with it; why that ends the request, if it does."""
        self.output_ids.append(token_id)
        self.timing.first_token_at = self.timing.first_token_at or now
        if row.logprobs is not None:
            self.record_output_logprobs(row.logprobs)
        if self.reasoning is not None:
            self.reasoning.count(token_id)
        finish = check_finish(self.output_ids, self.stop, decode, grammar_done=row.grammar_done)
        if finish is None:
            return None
        if finish.last_token_id is not None:
            self.output_ids[-1] = finish.last_token_id
        self.finish_length = finish.num_tokens
        return finish.reason

    def record_prompt_logprobs(self, tokens: tuple[TokenLogprobs, ...]) -> None:
        """Append log probabilities of prompt positions; a second prefill brings nothing new."""
        if self.logprobs is None:
            return
        if self.input_logprobs is None:
            self.input_logprobs = LogprobLists()
        lists = self.input_logprobs
        num_wanted = self.num_prompt - self.logprobs.start
        for token in tokens[: num_wanted - len(lists.values)]:
            if lists.values:
                lists.append(token, self.logprobs)
            else:
                lists.append_unknown(token.token_id, self.logprobs)

    def record_output_logprobs(self, token: TokenLogprobs) -> None:
        if self.logprobs is not None:
            if self.output_logprobs is None:
                self.output_logprobs = LogprobLists()
            self.output_logprobs.append(token, self.logprobs)

    def record_routing(self, chunk: RoutedExperts | None, *, end: int) -> None:
        if self.routed_experts is not None and chunk is not None:
            self.routed_experts.put(chunk, end=end)

    def announcement(self) -> NewRequest:
        """What a worker has to know of it: not to be asked again for what is recorded."""
        logprobs, routing = self.logprobs, self.routed_experts
        if logprobs is not None and self._has_prompt_logprobs:
            logprobs = msgspec.structs.replace(logprobs, start=self.num_prompt)
        return NewRequest(
            rid=self.rid,
            prompt_ids=array("i", self.prompt_ids).tobytes(),
            output_ids=array("i", self.output_ids).tobytes(),
            sampling=self.sampling,
            max_new_tokens=self.stop.max_new_tokens,
            namespace=self.namespace,
            logprobs=logprobs,
            routed_experts_start=routing.start + routing.num_tokens if routing else None,
            requires_reasoning=self.requires_reasoning,
        )
