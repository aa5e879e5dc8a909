"""When a request ends. The text of token i is the i-th letter, so 0 is "a"."""

from collections.abc import Sequence

import pytest

from sglmoe.scheduler.finish import (
    Finish,
    FinishReason,
    StopRules,
    check_finish,
    may_be_stopping,
)


def decode(token_ids: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token_id) for token_id in token_ids)


def rules(**changes: object) -> StopRules:
    return StopRules(**{"max_new_tokens": 10, "vocab_size": 26} | changes)  # type: ignore[arg-type]


def stop(matched: int | str, num_tokens: int) -> Finish:
    return Finish(FinishReason("stop", matched=matched), num_tokens)


def length(limit: int) -> Finish:
    return Finish(FinishReason("length", length=limit), limit)


def test_goes_on_until_the_length_is_reached() -> None:
    assert check_finish([1, 2], rules(max_new_tokens=3), decode) is None
    assert check_finish([1, 2, 3], rules(max_new_tokens=3), decode) == length(3)


def test_no_new_tokens_wanted_means_an_empty_answer() -> None:
    # Every request samples once; even a stop token does not count then.
    nothing = rules(max_new_tokens=0, token_ids=frozenset({4}))
    assert check_finish([4], nothing, decode) == length(0)


def test_stop_token_beats_length_in_the_same_step() -> None:
    both = rules(max_new_tokens=2, token_ids=frozenset({4}))
    assert check_finish([1, 4], both, decode) == stop(4, 2)


def test_stop_string_may_span_tokens_and_beats_the_stop_token() -> None:
    spanning = rules(strings=("cd",), tail_tokens=3, token_ids=frozenset({3}))
    assert check_finish([0, 1, 2], spanning, decode) is None
    assert check_finish([0, 1, 2, 3], spanning, decode) == stop("cd", 4)


def test_only_the_tail_is_looked_at() -> None:
    # "ab" came and went unnoticed only if nobody asked at its step; the window is two tokens.
    assert check_finish([0, 1, 2, 3], rules(strings=("ab",), tail_tokens=2), decode) is None


def test_regex() -> None:
    either = rules(regexes=("c|z",), tail_tokens=2)
    assert check_finish([0, 1], either, decode) is None
    assert check_finish([0, 1, 2], either, decode) == stop("c|z", 3)


def test_a_broken_regex_ends_only_its_own_request() -> None:
    finish = check_finish([0], rules(regexes=("(",), tail_tokens=2), decode)
    assert finish is not None
    assert (finish.reason.kind, finish.reason.status) == ("abort", 400)


@pytest.mark.parametrize("token_id", [-1, 26])
def test_an_id_outside_of_the_vocabulary_is_replaced(token_id: int) -> None:
    finish = check_finish([1, token_id], rules(replacement_id=7), decode)
    assert finish == Finish(FinishReason("stop", matched="NaN happened"), 2, last_token_id=7)


def test_a_finished_grammar_ends_the_request() -> None:
    assert check_finish([1, 5], rules(), decode, grammar_done=True) == stop(5, 2)


@pytest.mark.parametrize(
    ("output", "held"), [("x", False), ("xe", True), ("xen", True), ("xend", True), ("xendy", True)]
)
def test_text_that_may_become_a_stop_string_is_held(output: str, held: bool) -> None:
    token_ids = [ord(letter) - ord("a") for letter in output]
    assert may_be_stopping(token_ids, rules(strings=("end",), tail_tokens=4), decode) is held
