"""From requests to SGLang's messages: what to send when, as `output_streamer.py` does it.

One of the files that know SGLang.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenIDOutput,
    build_flat_top_logprobs_arrays,
    wrap_as_pickle,
)
from sglang.srt.utils.weight_versions import compute_weight_version_spans

from sglmoe.scheduler.finish import Decode, FinishReason, may_be_stopping
from sglmoe.scheduler.request import LogprobLists, Request

# SGLang's INIT_INCREMENTAL_DETOKENIZATION_OFFSET: prompt tokens that give the detokenizer context.
NUM_CONTEXT_TOKENS = 5
NO_LOGPROBS = slice(0, 0)


class Delta(msgspec.Struct, frozen=True, gc=False):
    """The part of a request that is about to be sent."""

    request: Request
    num_tokens: int  # of the output that have gone with it
    output_ids: list[int]
    decode_ids: list[int]
    logprobs: slice = NO_LOGPROBS  # of its output tokens
    with_input_logprobs: bool = False


def finish_dict(reason: FinishReason | None) -> dict[str, Any] | None:
    """SGLang's `BaseFinishReason.to_json`."""
    if reason is None:
        return None
    match reason.kind:
        case "stop":
            return {"type": "stop", "matched": reason.matched}
        case "length":
            return {"type": "length", "length": reason.length}
        case "abort":
            return {
                "type": "abort",
                "message": reason.message,
                "status_code": reason.status,
                "err_type": reason.error_type,
            }


def abort_message(request: Request) -> AbortReq:
    """What the tokenizer manager is told of a request that ended while it waited."""
    return AbortReq(
        rid=request.rid,
        finished_reason=finish_dict(request.finish),
        http_worker_ipc=request.display.http_worker,
    )


def is_due(request: Request, *, decode: Decode, force_interval: int) -> bool:
    """Whether a request's news should go out now."""
    sent, display = request.sent, request.display
    if request.finish is not None:
        return not sent.finish
    num_unsent = len(request.output_ids) - sent.num_tokens
    if not display.stream:
        return num_unsent >= force_interval
    if (num_unsent < display.stream_interval and sent.num_tokens) or num_unsent <= 0:
        return False
    stop = request.stop
    return not (stop.strings and may_be_stopping(request.output_ids, stop, decode))


def take_delta(request: Request) -> Delta:
    """What was not sent yet, which then counts as sent."""
    sent, output_ids = request.sent, request.output_ids
    start = sent.num_tokens
    end = len(output_ids) if request.finish_length is None else request.finish_length
    # Lists: of hundreds of requests that got one token each, arrays take ten times as long to pickle.
    new_ids = [output_ids[start]] if end == start + 1 else output_ids[start:end].tolist()
    decode_ids = new_ids
    if not sent.started:
        decode_ids = request.prompt_ids[-NUM_CONTEXT_TOKENS:].tolist() + new_ids
        sent.started = True
    if end > start:
        sent.num_tokens = end
    if request.finish is not None:
        sent.finish = True
    if request.logprobs is None:
        return Delta(request, end, new_ids, decode_ids)
    return Delta(request, end, new_ids, decode_ids, *_take_logprobs(request, end))


def _take_logprobs(request: Request, end: int) -> tuple[slice, bool]:
    """Those of output tokens that were not sent yet, and whether those of the prompt are due; they then count as sent."""
    sent, part = request.sent, NO_LOGPROBS
    if request.output_logprobs is not None:
        # A request for no tokens samples one all the same; see _output_columns.
        last = min(max(end, 1), len(request.output_logprobs.values))
        part, sent.num_logprobs = slice(sent.num_logprobs, last), last
    with_input_logprobs = bool(request.output_ids) and not sent.input_logprobs
    sent.input_logprobs |= with_input_logprobs
    return part, with_input_logprobs


def build_batch(
    deltas: Sequence[Delta],
    *,
    weight_version: str,
    vocab_size: int,
    time_stats: Callable[[Request], object] | None,
) -> BatchTokenIDOutput:
    """One message to the detokenizer. `time_stats` makes SGLang's SchedulerReqTimeStats, None where nobody looks."""
    requests = [delta.request for delta in deltas]
    displays = [request.display for request in requests]
    prompt_tokens = [request.num_prompt for request in requests]
    reasons = [request.finish for request in requests]
    ended = any(reasons)
    more = [request for request in requests if request.asks_for_more]
    return BatchTokenIDOutput(
        rids=[request.rid for request in requests],
        http_worker_ipcs=[display.http_worker for display in displays],
        finished_reasons=[finish_dict(reason) for reason in reasons] if ended else reasons,
        decoded_texts=[""] * len(requests),
        decode_ids=[delta.decode_ids for delta in deltas],
        read_offsets=[n if n < NUM_CONTEXT_TOKENS else NUM_CONTEXT_TOKENS for n in prompt_tokens],
        output_ids=[delta.output_ids for delta in deltas],
        skip_special_tokens=[display.skip_special_tokens for display in displays],
        spaces_between_special_tokens=[
            display.spaces_between_special_tokens for display in displays
        ],
        no_stop_trim=[display.no_stop_trim for display in displays],
        prompt_tokens=prompt_tokens,
        reasoning_tokens=_reasoning_tokens(requests) if more else [0] * len(requests),
        completion_tokens=[delta.num_tokens for delta in deltas],
        cached_tokens=[request.num_cached for request in requests],
        cached_tokens_details=[
            {"device": request.num_cached, "host": 0} if request.num_cached else None
            for request in requests
        ],
        retraction_counts=[request.num_retractions for request in requests],
        weight_versions=_weight_versions(requests, weight_version) if ended else None,
        dp_ranks=[None] * len(requests),
        routed_experts=_routed_experts(requests) if more else None,
        time_stats=wrap_as_pickle([time_stats(r) for r in requests]) if time_stats else None,
        **(_logprob_columns(deltas, vocab_size=vocab_size) if more else NO_LOGPROB_COLUMNS),
        output_token_entropy_val=None,
        output_token_sampling_mask=None,
        output_hidden_states=None,
        indexer_topk=None,
        placeholder_tokens_idx=None,
        placeholder_tokens_val=None,
    )


def _reasoning_tokens(requests: Sequence[Request]) -> list[int]:
    return [request.reasoning.num_tokens if request.reasoning else 0 for request in requests]


def _weight_versions(requests: Sequence[Request], current: str) -> list[Any]:
    return [
        compute_weight_version_spans([], current, request.num_output_tokens)
        if request.finished
        else None
        for request in requests
    ]


def _routed_experts(requests: Sequence[Request]) -> list[Any] | None:
    if not any(request.routed_experts for request in requests):
        return None
    return [routing_tensor(request) if request.finished else None for request in requests]


def routing_tensor(request: Request) -> Any:
    """int32 `[tokens, layers, top_k]` on the CPU, of all tokens from the start asked for but the last one."""
    record = request.routed_experts
    if record is None or not record.ids:
        return None
    import torch  # late: the scheduler is light without it

    num_tokens = len(request.prompt_ids) + request.num_output_tokens - 1 - record.start
    routing = torch.frombuffer(record.ids, dtype=torch.int32)
    routing = routing.view(-1, record.num_layers, record.top_k)
    return routing[: max(0, num_tokens)].clone()


def _logprob_columns(deltas: Sequence[Delta], *, vocab_size: int) -> dict[str, Any]:
    if not any(delta.request.logprobs for delta in deltas):
        return NO_LOGPROB_COLUMNS
    inputs = [_input_columns(delta, vocab_size=vocab_size) for delta in deltas]
    outputs = [_output_columns(delta) for delta in deltas]
    columns: dict[str, Any] = {
        **{name: [row[i] for row in inputs] for i, name in enumerate(_INPUT_COLUMNS)},
        **{name: [row[i] for row in outputs] for i, name in enumerate(_OUTPUT_COLUMNS)},
    }
    if not any(value is not None for value in columns["input_top_logprobs_val_flat"]):
        columns |= dict.fromkeys(name for name in _INPUT_COLUMNS if "_flat" in name)
    return columns


_INPUT_COLUMNS = (
    "input_token_logprobs_val",
    "input_token_logprobs_idx",
    "input_top_logprobs_val",
    "input_top_logprobs_idx",
    "input_token_ids_logprobs_val",
    "input_token_ids_logprobs_idx",
    "input_top_logprobs_val_flat",
    "input_top_logprobs_idx_flat",
    "input_top_logprobs_flat_null_prefix",
)
_OUTPUT_COLUMNS = (
    "output_token_logprobs_val",
    "output_token_logprobs_idx",
    "output_top_logprobs_val",
    "output_top_logprobs_idx",
    "output_token_ids_logprobs_val",
    "output_token_ids_logprobs_idx",
)
NO_LOGPROB_COLUMNS: dict[str, Any] = dict.fromkeys(_INPUT_COLUMNS + _OUTPUT_COLUMNS)


def _input_columns(delta: Delta, *, vocab_size: int) -> tuple[Any, ...]:
    request = delta.request
    lists = request.input_logprobs if delta.with_input_logprobs else None
    if lists is None or request.logprobs is None:
        return ([], [], [], [], [], [], None, None, None)
    # SGLang shows ids from vocab_size - 1 on as 0, for the sake of image tokens.
    ids = [token_id if token_id < vocab_size - 1 else 0 for token_id in lists.ids]
    top_values, top_ids, num_top = lists.top_values, lists.top_ids, request.logprobs.num_top
    flat: tuple[Any, ...] = (None, None, None)
    if request.display.flat_top_logprobs and num_top:
        flat = build_flat_top_logprobs_arrays(top_values, top_ids, num_top)
        top_values, top_ids = [], []
    picked_ids = _picked_ids(request, lists.picked_values)
    return (lists.values, ids, top_values, top_ids, lists.picked_values, picked_ids, *flat)


def _output_columns(delta: Delta) -> tuple[Any, ...]:
    request, lists = delta.request, delta.request.output_logprobs or LogprobLists()
    part = delta.logprobs
    picked = lists.picked_values[part]
    if request.stop.max_new_tokens == 0:
        # SGLang samples nothing then, and answers for the picked ids alone (it is how it scores).
        return ([], [], [], [], picked, _picked_ids(request, picked))
    return (
        lists.values[part],
        lists.ids[part],
        lists.top_values[part],
        lists.top_ids[part],
        picked,
        _picked_ids(request, picked),
    )


def _picked_ids(request: Request, values: Sequence[object]) -> list[list[int] | None]:
    if request.logprobs is None or request.logprobs.token_ids is None:
        return []
    token_ids = list(request.logprobs.token_ids)
    return [None if value is None else token_ids for value in values]
