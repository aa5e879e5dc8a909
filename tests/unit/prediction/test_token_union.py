"""From tokens to their step."""

import numpy as np
import pytest

from sglmoe.prediction.token_union import any_token, sampled_tokens


def test_any_of_two_tokens() -> None:
    probabilities = np.array([[0.5, 0.0, 1.0], [0.2, 0.0, 0.3]], np.float32)
    assert any_token(probabilities, 2).tolist() == pytest.approx([0.6, 0, 1])


def test_one_token_is_its_step_to_the_last_bit() -> None:
    tiny = np.array([[1e-9, 0.1]], np.float32)
    assert any_token(tiny, 1).tolist() == tiny[0].tolist()


def test_the_others_are_like_those_sampled() -> None:
    """One of two tokens is known, and uses the expert with 0.5: neither does with 0.25."""
    assert any_token(np.array([[0.5]], np.float32), 2).tolist() == [0.75]


def test_sampled_tokens_are_evenly_spaced_and_the_last_is_among_them() -> None:
    assert sampled_tokens(10, 4).tolist() == [1, 4, 6, 9]
    assert sampled_tokens(3, 4).tolist() == [0, 1, 2]
    assert sampled_tokens(0, 4).tolist() == []
