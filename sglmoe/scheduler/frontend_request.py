"""From SGLang's tokenized request to ours: validation, and the facts that scheduling needs.

One of the files that know SGLang. Follows `Scheduler._handle_generate_request` and `init_req_max_new_tokens`.
"""

from array import array
from collections.abc import Callable
from typing import Any

import msgspec
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from sglmoe.errors import requests
from sglmoe.protocol import Limits, LogprobSpec
from sglmoe.scheduler.finish import StopRules
from sglmoe.scheduler.reasoning import ReasoningCounter
from sglmoe.scheduler.request import Display, Request, RoutingRecord

# Fields of TokenizedGenerateReqInput that ask for something this server does not do.
UNSUPPORTED_FIELDS = (
    "input_embeds",
    "mm_inputs",
    "token_type_ids",
    "session_params",
    "session_id",
    "lora_id",
    "return_hidden_states",
    "custom_logit_processor",
    "positional_embed_overrides",
    "bootstrap_host",
    "bootstrap_room",
    "return_sampling_mask",
    "return_indexer_topk",
    "multi_item_delimiter_indices",
    "token_indices_to_pool",
)

# SGLang's margin: a prompt leaves room for so many tokens more.
PROMPT_MARGIN_TOKENS = 5


class RequestRules(msgspec.Struct, frozen=True):
    """What the server adds to every request."""

    limits: Limits
    eos_ids: frozenset[int]
    replacement_id: int | None
    stream_interval: int
    truncate_prompts: bool
    max_new_tokens_limit: int | None
    count_reasoning: Callable[[TokenizedGenerateReqInput], ReasoningCounter | None]

    @property
    def max_request_tokens(self) -> int:
        """Prompt and output together: SGLang's max_req_len."""
        return min(self.limits.context_tokens, self.limits.total_tokens) - 1

    @property
    def max_prompt_tokens(self) -> int:
        """Prompts must be shorter: SGLang's max_req_input_len."""
        return self.max_request_tokens - PROMPT_MARGIN_TOKENS


def translate(message: TokenizedGenerateReqInput, rules: RequestRules) -> Request:
    """A request for the scheduler. Raises ValueError, with what to change, for one that can't be served."""
    _check_fields(message)
    _check_prompt(message, rules)
    sampling = message.sampling_params
    _limit_output(message.rid, sampling, len(message.input_ids), rules)
    return Request(
        rid=message.rid,
        prompt_ids=message.input_ids,
        stop=_stop_rules(sampling, rules),
        sampling=msgspec.msgpack.encode(sampling),
        namespace=_namespace(message),
        logprobs=_logprob_spec(message),
        routed_experts=_routing_record(message),
        reasoning=rules.count_reasoning(message),
        requires_reasoning=message.require_reasoning,
        has_grammar=_has_grammar(sampling),
        priority=message.priority,
        display=display(message, stream_interval=rules.stream_interval),
    )


def display(message: TokenizedGenerateReqInput, *, stream_interval: int) -> Display:
    """How the request's output is shown; needed even for a refusal."""
    sampling = message.sampling_params
    return Display(
        stream=message.stream,
        stream_interval=sampling.stream_interval or stream_interval,
        skip_special_tokens=sampling.skip_special_tokens,
        spaces_between_special_tokens=sampling.spaces_between_special_tokens,
        no_stop_trim=sampling.no_stop_trim,
        flat_top_logprobs=message.return_flat_raw_top_logprobs,
        http_worker=message.http_worker_ipc,
        is_health_check=message.rid.startswith(HEALTH_CHECK_RID_PREFIX),
    )


def refused(message: Any) -> Request:
    """A request to refuse: whatever it is, it has an rid and someone who waits for it."""
    rules = StopRules(max_new_tokens=0, vocab_size=0)
    shown = Display(http_worker=message.http_worker_ipc)
    prompt_ids = message.input_ids or array("q")  # none where embeddings came in their place
    return Request(rid=message.rid, prompt_ids=prompt_ids, stop=rules, display=shown)


def _check_fields(message: TokenizedGenerateReqInput) -> None:
    for name in UNSUPPORTED_FIELDS:
        value = getattr(message, name)
        if value is not None and value is not False:
            raise requests.unsupported_field(name=name)
    if (message.sampling_params.beam_width or 1) > 1:
        raise requests.beam_search()
    if message.sampling_params.watermark is not None:
        raise requests.unsupported_field(name="watermark")


def _check_prompt(message: TokenizedGenerateReqInput, rules: RequestRules) -> None:
    limits, num_tokens = rules.limits, len(message.input_ids or ())
    if num_tokens == 0:
        raise requests.empty_prompt()
    if num_tokens >= rules.max_prompt_tokens:
        if not rules.truncate_prompts:
            raise requests.prompt_too_long(
                num_tokens=num_tokens,
                max_tokens=rules.max_prompt_tokens,
                kv_tokens=limits.total_tokens,
                context_tokens=limits.context_tokens,
            )
        message.input_ids = message.input_ids[: rules.max_prompt_tokens]
    lowest, highest = min(message.input_ids), max(message.input_ids)
    if lowest < 0 or highest >= limits.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise requests.token_outside_vocabulary(token_id=wrong, vocab_size=limits.vocab_size)


def _limit_output(
    rid: str, sampling: SamplingParams, num_prompt_tokens: int, rules: RequestRules
) -> None:
    """Cut max_new_tokens down to what there is room for; refuse what was asked for and can never fit in memory."""
    limits, asked = rules.limits, sampling.max_new_tokens
    if asked is not None:
        wanted = num_prompt_tokens + min(asked, limits.context_tokens - 1 - num_prompt_tokens)
        if wanted > limits.total_tokens:
            raise requests.output_too_long(
                prompt_tokens=num_prompt_tokens,
                max_new_tokens=asked,
                kv_tokens=limits.total_tokens,
            )
    limit = rules.max_request_tokens - num_prompt_tokens - 1
    if rules.max_new_tokens_limit:
        limit = min(limit, rules.max_new_tokens_limit)
    sampling.max_new_tokens = max(0, limit if asked is None else min(asked, limit))
    sampling.min_new_tokens = min(sampling.min_new_tokens, sampling.max_new_tokens)


def _stop_rules(sampling: SamplingParams, rules: RequestRules) -> StopRules:
    stop_ids = frozenset(sampling.stop_token_ids or ())
    replacement_id = rules.replacement_id
    if replacement_id is None and stop_ids:
        replacement_id = min(stop_ids)
    return StopRules(
        max_new_tokens=sampling.max_new_tokens,
        vocab_size=rules.limits.vocab_size,
        token_ids=frozenset() if sampling.ignore_eos else stop_ids | rules.eos_ids,
        replacement_id=replacement_id,
        strings=tuple(sampling.stop_strs or ()),
        regexes=tuple(sampling.stop_regex_strs or ()),
        tail_tokens=max(sampling.stop_str_max_len, sampling.stop_regex_max_len) + 1,
    )


def _logprob_spec(message: TokenizedGenerateReqInput) -> LogprobSpec | None:
    if not message.return_logprob:
        return None
    num_prompt_tokens = len(message.input_ids)
    start = message.logprob_start_len
    if start > num_prompt_tokens:
        raise requests.logprobs_behind_prompt(start=start, prompt_tokens=num_prompt_tokens)
    return LogprobSpec(
        start=num_prompt_tokens if start < 0 else start,
        num_top=message.top_logprobs_num,
        token_ids=None if message.token_ids_logprob is None else tuple(message.token_ids_logprob),
    )


def _routing_record(message: TokenizedGenerateReqInput) -> RoutingRecord | None:
    if not message.return_routed_experts:
        return None
    start = message.routed_experts_start_len
    if not 0 <= start <= len(message.input_ids):
        raise requests.routing_behind_prompt(start=start, prompt_tokens=len(message.input_ids))
    return RoutingRecord(start=start)


def _namespace(message: TokenizedGenerateReqInput) -> str:
    if not message.extra_key and not message.cache_salt:
        return ""
    return msgspec.json.encode((message.extra_key, message.cache_salt)).decode()


def _has_grammar(sampling: SamplingParams) -> bool:
    grammars = (sampling.json_schema, sampling.regex, sampling.ebnf, sampling.structural_tag)
    return any(grammar is not None for grammar in grammars)
