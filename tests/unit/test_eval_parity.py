"""What `eval.parity` and `eval.accuracy` judge: the smallest difference counts, and where it does not."""

import math

import pytest

from eval.accuracy import Score
from eval.parity import Answer, Difference, compare, holds, memory_budget

THEIRS = Answer(
    num_prompt_tokens=4,
    num_cached_tokens=0,
    tokens=[5, 6, 7],
    logprobs=[-0.5, -0.25, -1.0],
    top=[{5: -0.5, 9: -1.0}],
)
OTHER_BIT = THEIRS._replace(logprobs=[-0.5, math.nextafter(-0.25, 0), -1.0])
OTHER_TOKEN = THEIRS._replace(tokens=[5, 8, 7])


def alone(*ours: Answer) -> Difference:
    return compare([THEIRS] * len(ours), list(ours), together=False)


def together(*ours: Answer) -> Difference:
    return compare([THEIRS] * len(ours), list(ours), together=True)


def test_equal_answers_hold() -> None:
    assert alone(THEIRS) == Difference(1, 1, 1.0, 0.0, 0.0, alike_are_equal=True)
    assert holds(alone(THEIRS), exact=False)


def test_one_bit_of_one_log_probability_counts_for_a_lone_request() -> None:
    difference = alone(THEIRS, OTHER_BIT)
    assert 0 < difference.max_logprob_difference < 1e-15
    assert not holds(difference, exact=False)


def test_one_bit_does_not_count_where_other_rows_were_computed() -> None:
    # Beside other requests, or after less of a cached prefix: that changes last bits in either server.
    assert holds(together(OTHER_BIT), exact=True)
    difference = alone(THEIRS, OTHER_BIT._replace(num_cached_tokens=2))
    assert difference.num_alike == 1
    assert holds(difference, exact=True)


def test_there_one_token_counts_in_float32_only() -> None:
    for difference in (together(OTHER_TOKEN), alone(OTHER_TOKEN._replace(num_cached_tokens=2))):
        assert difference.equal_tokens_ratio == pytest.approx(1 / 3)
        assert not holds(difference, exact=True)
        assert holds(difference, exact=False)
    assert not holds(alone(OTHER_TOKEN), exact=False)


def test_fewer_log_probabilities_are_no_match() -> None:
    difference = alone(THEIRS._replace(logprobs=[-0.5, -0.25]))
    assert difference.max_logprob_difference == math.inf


def test_divergence_of_what_was_likely() -> None:
    ours = THEIRS._replace(top=[{5: -1.0, 9: -0.5}])
    expected = math.exp(-0.5) * 0.5 + math.exp(-1.0) * -0.5
    assert alone(ours).max_kl_nats == pytest.approx(expected)


def test_a_share_of_the_experts_as_a_budget() -> None:
    # Frames of 1000 bytes hold one expert or 40 tokens; 50 % of 100 experts and 100 tokens of KV.
    memory = {"frame_bytes": 1000, "num_frames": 204, "total_pages": 800, "page_tokens": 10}
    limits = {"dense_bytes": 7, "expert_bytes": 100_000, "floor_frames": 4}
    state = {"memory": memory, "limits": limits}
    assert memory_budget("50%", state, 100) == str(7 + (50 + 3 + 1) * 1000)
    assert memory_budget("2GiB", state, 100) == "2GiB"


def test_wilson_interval() -> None:
    # The textbook's: 8 of 10 is 49 % to 94 %.
    low, high = Score(8, 10, []).interval
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))
