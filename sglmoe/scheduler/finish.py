"""When a request is finished, decided as SGLang's `Req.update_finish_state` decides it.

Knows token ids and text, and neither SGLang nor the worker. `min_new_tokens` is not here: the worker's sampler enforces it.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from sglmoe.errors.requests import bad_stop_regex
from sglmoe.errors.user_error import UserError

Decode = Callable[[Sequence[int]], str]


class FinishReason(msgspec.Struct, frozen=True):
    """Why a request ended. `matched`, `length` and the error belong to the kinds stop, length and abort."""

    kind: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None
    status: int | None = None  # HTTP status
    error_type: str | None = None


class StopRules(msgspec.Struct, frozen=True):
    """What ends one request."""

    max_new_tokens: int
    vocab_size: int
    token_ids: frozenset[int] = frozenset()  # EOS and stop tokens; empty with ignore_eos
    replacement_id: int | None = None  # takes the place of an id outside of the vocabulary
    strings: tuple[str, ...] = ()
    regexes: tuple[str, ...] = ()
    tail_tokens: int = 1  # a stop string or regex can't be longer than this many tokens

    def lets_go_on(self, token_id: int, num_tokens: int) -> bool:
        """Whether this token, number `num_tokens` of the output, ends nothing, as far as can be said without its text."""
        return (
            num_tokens < self.max_new_tokens
            and 0 <= token_id < self.vocab_size
            and token_id not in self.token_ids
            and not self.strings
            and not self.regexes
        )


class Finish(msgspec.Struct, frozen=True):
    """The end of a request: its first `num_tokens` output tokens are the answer, the last of them may be replaced."""

    reason: FinishReason
    num_tokens: int
    last_token_id: int | None = None


def aborted(message: str, status: int | None = None) -> FinishReason:
    """An end that is an error; 4xx are the client's fault, 5xx ours."""
    names = {400: "BadRequestError", 500: "InternalServerError", 503: "ServiceUnavailableError"}
    error_type = names.get(status) if status is not None else None
    return FinishReason(kind="abort", message=message, status=status, error_type=error_type)


def failed(error: UserError) -> FinishReason:
    """An end that is an error of ours or of the client's, with what to change."""
    return aborted(str(error), error.status)


def is_our_fault(reason: FinishReason | None) -> bool:
    return reason is not None and reason.status == 500


def check_finish(
    output_ids: Sequence[int], rules: StopRules, decode: Decode, *, grammar_done: bool = False
) -> Finish | None:
    """Whether the newest of `output_ids` ends the request. To be asked after every single token."""
    num_tokens = len(output_ids)
    finish = _check_vocabulary(output_ids, rules)
    if finish is None and (rules.strings or rules.regexes):
        finish = _check_text(output_ids, rules, decode)
    if finish is None and output_ids[-1] in rules.token_ids:
        finish = Finish(FinishReason("stop", matched=output_ids[-1]), num_tokens)
    if num_tokens > rules.max_new_tokens or (finish is None and num_tokens == rules.max_new_tokens):
        limit = rules.max_new_tokens
        return Finish(FinishReason("length", length=limit), limit)
    if finish is None and grammar_done:
        return Finish(FinishReason("stop", matched=output_ids[-1]), num_tokens)
    return finish


def tail_text(output_ids: Sequence[int], rules: StopRules, decode: Decode) -> str:
    """The end of the output's text, long enough for every stop string and regex; empty if there are none."""
    if not rules.strings and not rules.regexes:
        return ""
    return decode(output_ids[-rules.tail_tokens :])


def may_be_stopping(output_ids: Sequence[int], rules: StopRules, decode: Decode) -> bool:
    """Whether the output ends within a stop string, so that it must not be streamed yet."""
    if not rules.strings:
        return False
    tail = tail_text(output_ids, rules, decode)
    return any(_overlaps(tail, string) for string in rules.strings if string)


def _overlaps(tail: str, stop: str) -> bool:
    if stop in tail:
        return True
    return any(tail.endswith(stop[:size]) for size in range(1, min(len(tail), len(stop)) + 1))


def _check_vocabulary(output_ids: Sequence[int], rules: StopRules) -> Finish | None:
    if 0 <= output_ids[-1] < rules.vocab_size:
        return None
    reason = FinishReason("stop", matched="NaN happened")
    return Finish(reason, len(output_ids), last_token_id=rules.replacement_id)


def _check_text(output_ids: Sequence[int], rules: StopRules, decode: Decode) -> Finish | None:
    tail = tail_text(output_ids, rules, decode)
    if not tail:
        return None
    for string in rules.strings:
        if string in tail:
            return Finish(FinishReason("stop", matched=string), len(output_ids))
    for regex in rules.regexes:
        try:
            matched = re.search(regex, tail)
        except (re.error, RecursionError) as error:
            reason = failed(bad_stop_regex(regex=regex, why=str(error)))
            return Finish(reason, len(output_ids))
        if matched:
            return Finish(FinishReason("stop", matched=regex), len(output_ids))
    return None
