"""Sampling state of the running requests: penalties, biases, grammars, as sglang's `SamplingBatchInfo` wants them.

SGLang's penalizers keep a row of state per request of a batch. So that this state is not built anew in every step, the info of
the last decode batch is kept, and only leavers are filtered out of it and joiners merged into it.

One of the files that know sglang.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import torch
import xgrammar
from sglang.srt.constrained.base_grammar_backend import InvalidGrammarObject, create_grammar_backend
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import (
    SamplingParams,
    get_request_reasoning_end_token_ids,
    get_request_reasoning_in_grammar,
)

from sglmoe.errors.requests import no_grammars
from sglmoe.worker.request import WorkerRequest

# Arbitrary: what is kept of compiled grammars for requests to come, and of their parts. SGLang keeps all, and a client
# may ask for another one with each request.
MAX_GRAMMARS = 128
GRAMMAR_CACHE_BYTES = 256 << 20


class SamplingRequest:
    """What sglang's sampling code reads of its `Req`."""

    custom_logit_processor = None
    return_sampling_mask = False
    sampling_logprobs_mode = "selected"

    def __init__(self, request: WorkerRequest, *, tokenizer: Any, eos_token_ids: set[int] | None):
        self.request = request
        self.rid = request.rid
        self.sampling_params = msgspec.msgpack.decode(request.spec.sampling, type=SamplingParams)
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.grammar: Any = None

    @property
    def output_ids(self) -> list[int]:
        return self.request.tokens[self.request.num_prompt :].tolist()


class Batch:
    """What sglang's sampling code reads of its `ScheduleBatch`; penalizers hold a weak reference to it."""

    def __init__(self, reqs: list[SamplingRequest], device: str):
        self.reqs = reqs
        self.device = device


class SamplingGroup:
    """Requests that sample together, and sglang's info on them, row by row."""

    def __init__(
        self,
        requests: Sequence[SamplingRequest],
        *,
        vocab_size: int,
        device: str,
        penalizes_late: bool,
    ):
        self._device = device
        self._penalizes_late = penalizes_late
        self._batch = Batch(list(requests), device)
        self.info = SamplingBatchInfo.from_schedule_batch(self._batch, vocab_size)

    @property
    def requests(self) -> list[SamplingRequest]:
        return self._batch.reqs

    def keep(self, kept: list[int]) -> None:
        """Drop all rows but these."""
        # As in sglang's ScheduleBatch: filtering sees the remaining requests, merging the old ones.
        self._batch.reqs = [self._batch.reqs[i] for i in kept]
        self.info.filter_batch(kept, torch.tensor(kept, dtype=torch.int64, device=self._device))

    def join(self, other: "SamplingGroup") -> None:
        """Append another group's rows."""
        self.info.merge_batch(other.info)
        self._batch.reqs = self._batch.reqs + other.requests

    def sampled(self, token_ids: Sequence[int]) -> None:
        """Count one token a row for the penalties: these, which were sampled just now, or those before them."""
        if self.info.penalizer_orchestrator.is_required:
            if self._penalizes_late:
                token_ids = [request.request.tokens[-1] for request in self.requests]
            self.count(token_ids)

    def count(self, token_ids: Sequence[int]) -> None:
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        self.info.penalizer_orchestrator.cumulate_output_tokens(ids)

    def accept(self, token_ids: Sequence[int]) -> list[tuple[bool, str]]:
        """Advance each row's grammar: whether it is done now, and what is wrong with the token ("" for nothing)."""
        return [
            accept_token(request.grammar, token_id)
            for request, token_id in zip(self.requests, token_ids, strict=True)
        ]

    def set_grammars(self) -> None:
        grammars = [request.grammar for request in self.requests]
        self.info.grammars = grammars if any(grammars) else None


class SamplingState:
    """The sampling side of every request the worker knows.

    `penalizes_late`: penalties count a token one step late, and the prompt's last token first. So does SGLang's overlapped
    scheduler, its default: when it prepares a step, the token before has not come back. (It also misses a token where a
    prefill comes between two decode steps; we don't, or what shares the batch would change the answer.)
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        device: str,
        tokenizer: Any,
        eos_token_ids: set[int] | None,
        penalizes_late: bool,
    ):
        self._penalizes_late = penalizes_late
        self._vocab_size = vocab_size
        self._device = device
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._requests: dict[str, SamplingRequest] = {}
        self._decoding: SamplingGroup | None = None

    def add(self, request: WorkerRequest) -> SamplingRequest:
        sampling = SamplingRequest(
            request, tokenizer=self._tokenizer, eos_token_ids=self._eos_token_ids
        )
        self._requests[request.rid] = sampling
        return sampling

    def forget(self, rid: str) -> None:
        self._requests.pop(rid, None)

    def group(self, rids: Sequence[str]) -> SamplingGroup:
        """The group of exactly these requests, in an order of its own."""
        requests = [self._requests[rid] for rid in rids]
        if not any(request.request.num_output for request in requests):
            group = self._fresh(requests)  # first tokens; leaves those who decode in peace
        else:
            group = self._decoding = self._regroup(requests)
        group.set_grammars()
        return group

    def _regroup(self, requests: Sequence[SamplingRequest]) -> SamplingGroup:
        group = self._decoding
        wanted = {request.rid for request in requests}
        present = [request.rid for request in group.requests] if group else []
        kept = [i for i, rid in enumerate(present) if rid in wanted]
        if group is None or not kept:
            return self._replayed(requests)
        if len(kept) < len(present):
            group.keep(kept)
        if joiners := [request for request in requests if request.rid not in present]:
            group.join(self._replayed(joiners))
        return group

    def _fresh(self, requests: Sequence[SamplingRequest]) -> SamplingGroup:
        return SamplingGroup(
            requests,
            vocab_size=self._vocab_size,
            device=self._device,
            penalizes_late=self._penalizes_late,
        )

    def _replayed(self, requests: Sequence[SamplingRequest]) -> SamplingGroup:
        """A group whose penalties have seen what the requests have generated already."""
        if not any(needs_replay(request) for request in requests):
            return self._fresh(requests)
        groups = [self._fresh([request]) for request in requests]
        for group in groups:
            for token_id in self._counted(group.requests[0].request):
                group.count([token_id])
        for group in groups[1:]:
            groups[0].join(group)
        return groups[0]

    def _counted(self, request: WorkerRequest) -> Sequence[int]:
        """What the penalties of a request have seen when its next token is sampled."""
        late = int(self._penalizes_late)
        return request.tokens[request.num_prompt - late : len(request.tokens) - late]


def needs_replay(request: SamplingRequest) -> bool:
    params = request.sampling_params
    return request.request.num_output > 0 and (
        params.frequency_penalty != 0
        or params.presence_penalty != 0
        or params.repetition_penalty != 1
        or params.min_new_tokens > 0
    )


def accept_token(grammar: Any, token_id: int) -> tuple[bool, str]:
    """Advance a grammar; whether it was done before this token, and an error if it did not admit it.

    SGLang looks before it accepts: where ignore_eos keeps a request going, it ends one token after its grammar.
    """
    if grammar is None:
        return False, ""
    if grammar.is_terminated():
        return True, ""
    try:
        grammar.accept_token(token_id)
    except ValueError as error:
        return False, f"the grammar does not admit the sampled token {token_id}: {error}"
    return False, ""


class GrammarCompiler:
    """Compiles grammars in sglang's thread pool, so that no step waits for one. `backend` is sglang's, or None."""

    def __init__(self, backend: Any):
        self._backend = backend
        self._pending: dict[str, tuple[SamplingRequest, tuple[str, str], Future[Any]]] = {}

    @property
    def has_pending(self) -> bool:
        return bool(self._pending)

    def start(self, request: SamplingRequest) -> str | None:
        """Begin to compile the request's grammar. None where it has none or `finished` will tell; else its error or ""."""
        key = grammar_key(request.sampling_params)
        if key is None:
            return None
        if self._backend is None:
            return str(no_grammars())
        budget = thinking_budget(request.sampling_params)
        # How the prompt ends decides, whatever a request that comes from another worker has generated since.
        prompt = request.request.tokens[: request.request.num_prompt]
        key = self._backend.get_request_grammar_key(key, input_ids=prompt, thinking_budget=budget)
        value, is_cached = self._backend.get_cached_or_future_value(
            key, request.request.spec.requires_reasoning
        )
        if is_cached:
            return give_grammar(request, key, value)
        self._pending[request.rid] = (request, key, value)
        return None

    def forget(self, rid: str) -> None:
        if entry := self._pending.pop(rid, None):
            entry[2].cancel()

    def finished(self) -> Iterator[tuple[str, str]]:
        """The requests whose grammars are ready, with their errors ("" for none)."""
        done = [rid for rid, (_, _, future) in self._pending.items() if future.done()]
        for rid in done:
            request, key, future = self._pending.pop(rid)
            try:
                value = future.result()
            except Exception as error:  # a compiler may raise anything on somebody's input
                value = InvalidGrammarObject(f"Grammar compilation failed: {error}")
            self._keep(key, value.copy())
            yield rid, give_grammar(request, key, value)

    def _keep(self, key: tuple[str, str], grammar: Any) -> None:
        """For whoever asks for the same; when there are too many, all others are forgotten."""
        if len(self._backend.cache) >= MAX_GRAMMARS:
            self._backend.reset()
        self._backend.set_cache(key, grammar)


def make_grammar_backend(server_args: Any, model_config: Any, tokenizer: Any) -> Any:
    """SGLang's, of the kind that its flags ask for; None without a tokenizer."""
    if tokenizer is None:
        return None
    backend = create_grammar_backend(
        server_args,
        tokenizer,
        model_config.vocab_size,
        model_config.hf_eos_token_id,
        think_end_ids=model_config.think_end_ids,
    )
    limit_compiler(getattr(backend, "grammar_backend", backend), GRAMMAR_CACHE_BYTES)
    return backend


def limit_compiler(backend: Any, cache_bytes: int) -> None:
    """Bound what xgrammar keeps of all that it has compiled; its `clear_cache` leaves the rules of grammars where they are."""
    if hasattr(backend, "grammar_compiler"):
        backend.grammar_compiler = xgrammar.GrammarCompiler(
            backend._tokenizer_info, cache_limit_bytes=cache_bytes
        )


def give_grammar(request: SamplingRequest, key: tuple[str, str], grammar: Any) -> str:
    """Hand a compiled grammar to its request, replaying what it has generated; an error or ""."""
    if isinstance(grammar, InvalidGrammarObject):
        return f"Failed to compile {key[0]} grammar: {grammar.error_message}"
    if isinstance(grammar, ReasonerGrammarObject):
        custom = request.sampling_params.custom_params
        if (end_ids := get_request_reasoning_end_token_ids(custom)) is not None:
            grammar.set_request_think_end_ids(end_ids)
        if get_request_reasoning_in_grammar(custom):
            grammar.set_reasoning_in_grammar()
        if (budget := thinking_budget(request.sampling_params)) is not None:
            grammar.max_think_tokens = budget
    for token_id in request.output_ids:
        _, error = accept_token(grammar, token_id)
        if error:
            return error
    request.grammar = grammar
    return ""


def grammar_key(params: SamplingParams) -> tuple[str, str] | None:
    """SGLang's cache key of the constraint a request asks for."""
    if params.json_schema is not None:
        return "json", params.json_schema
    if params.regex is not None:
        return "regex", params.regex
    if params.ebnf is not None:
        return "full_assistant_ebnf" if params.ebnf_full_assistant else "ebnf", params.ebnf
    if params.structural_tag is not None:
        return "structural_tag", params.structural_tag
    return None


def thinking_budget(params: SamplingParams) -> int | None:
    custom = params.custom_params
    budget = custom.get("thinking_budget") if isinstance(custom, dict) else None
    return budget if isinstance(budget, int) else None
