"""Which experts a token gets: the rules of the families, on 4 experts or 2 groups of them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglmoe.prediction.router import Router

ONE_LAYER = slice(0, 1)


def router(num_experts: int = 4, top_k: int = 2, **rule: Any) -> Router:
    """Of one layer, whose gate reads as many numbers as there are experts, and repeats them."""
    return Router(np.eye(num_experts, dtype=np.float32)[None], top_k, **rule)


def chosen(router: Router, *logits: float) -> list[int]:
    ids, _ = router.choose(np.array([[logits]], np.float32), ONE_LAYER)
    choice: list[int] = ids[0, 0].tolist()
    return choice


def row(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


def test_gates_of_two_layers_speak_to_two_tokens() -> None:
    weights = np.array([[[1, 0], [0, 1], [1, 1]], [[2, 0], [0, 2], [0, 0]]], np.float32)
    hidden = np.array([[3, 4], [5, 6]], np.float16)
    logits = Router(weights, 1).logits(hidden, slice(0, 2))
    assert logits.tolist() == [[[3, 4, 7], [5, 6, 11]], [[6, 8, 0], [10, 12, 0]]]
    assert logits.dtype == np.float32
    assert Router(weights, 1).logits(hidden, slice(1, 2)).tolist() == logits[1:].tolist()


def test_a_bias_belongs_to_its_layer() -> None:
    weights = np.zeros((2, 3, 2), np.float32)
    bias = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    logits = Router(weights, 1, logit_bias=bias).logits(np.ones((2, 2)), slice(1, 2))
    assert logits.tolist() == [[[4, 5, 6], [4, 5, 6]]]


def test_the_likeliest_come_first() -> None:
    ids, probabilities = router().choose(
        np.log([[[0.1, 0.4, 0.2, 0.3]]], dtype=np.float32), ONE_LAYER
    )
    assert ids.tolist() == [[[1, 3]]]
    np.testing.assert_allclose(probabilities, [[[0.1, 0.4, 0.2, 0.3]]], rtol=1e-6)


def test_a_correction_decides_who_is_chosen_and_not_how_likely_they_are() -> None:
    corrected = router(scoring="sigmoid", correction_bias=row(0, 0, 0, 0.5))
    logits = np.array([[[2, 1, 0, 0]]], np.float32)
    ids, probabilities = corrected.choose(logits, ONE_LAYER)
    assert ids.tolist() == [[[3, 0]]]  # 0.5 + 0.5 before 0.88
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), rtol=1e-6)


def test_a_correction_adds_to_the_softmax_where_that_is_the_score() -> None:
    assert chosen(router(top_k=1, correction_bias=row(0, 0, 0, 0.5)), 3, 1, 0, 0) == [0]
    assert chosen(router(top_k=1, correction_bias=row(0, 0, 0, 0.5)), 1, 1, 0, 0) == [3]


def test_deepseek_v2_takes_the_group_of_the_best_expert() -> None:
    grouped = router(num_groups=2, top_groups=1)
    assert chosen(grouped, 9, 0, 8, 7) == [0, 1]  # though 8 + 7 is more


def test_deepseek_v3_takes_the_group_whose_best_two_are_better() -> None:
    rule: dict[str, Any] = {"scoring": "sigmoid", "num_groups": 2, "top_groups": 1}
    grouped = router(correction_bias=row(0, 0, 0, 0), **rule)
    assert chosen(grouped, 9, 0, 8, 7) == [2, 3]
    # Of groups, corrected scores count too.
    grouped = router(correction_bias=row(0, 0.6, 0, 0), **rule)
    assert chosen(grouped, 9, 0, 8, 7) == [1, 0]


def test_experts_of_other_groups_are_out_however_good() -> None:
    grouped = router(6, 3, num_groups=3, top_groups=2)
    logits = np.array([[[5, 1, 4, 3, 2, 6]]], np.float32)
    left = grouped.eligible(grouped.preferences(logits, ONE_LAYER))
    assert left.tolist() == [[[5, 1, -np.inf, -np.inf, 2, 6]]]
    assert chosen(grouped, 5, 1, 4, 3, 2, 6) == [5, 0, 4]


def test_extreme_logits_are_certain_and_not_nan() -> None:
    for scoring in ("softmax", "sigmoid"):
        certain = router(scoring=scoring).probabilities(
            np.array([[[-1e4, 1e4, -1e4, -1e4]]], np.float32)
        )
        assert certain.tolist() == [[[0, 1, 0, 0]]]


def choice_in_words(
    scores: list[float], *, top_k: int, num_best: int, top_groups: int
) -> list[int]:
    """Of 4 groups of 2, as the papers tell it."""
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    worth = [sum(sorted(scores[e] for e in group)[-num_best:]) for group in groups]
    best = sorted(range(4), key=lambda group: -worth[group])[:top_groups]
    allowed = [expert for group in best for expert in groups[group]]
    return sorted(sorted(allowed), key=lambda expert: -scores[expert])[:top_k]


@given(st.permutations(range(8)), st.integers(1, 4), st.integers(1, 2), st.booleans())
def test_groups_as_the_papers_tell_it(
    order: list[int], top_groups: int, top_k: int, corrected: bool
) -> None:
    # Powers of two: no two groups of two are worth the same.
    scores = [2.0**-place for place in order]
    rule: dict[str, Any] = {"num_groups": 4, "top_groups": top_groups}
    if corrected:
        rule |= {"scoring": "sigmoid", "correction_bias": row(*scores)}
    logits = [0.0] * 8 if corrected else scores
    expected = choice_in_words(scores, top_k=top_k, num_best=1 + corrected, top_groups=top_groups)
    assert chosen(router(8, top_k, **rule), *logits) == expected


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_layers_and_tokens_are_independent(num_tokens: int) -> None:
    random = np.random.default_rng(0)
    whole = Router(random.normal(size=(3, 8, 5)).astype(np.float32), 3, num_groups=4, top_groups=2)
    hidden = random.normal(size=(num_tokens, 5)).astype(np.float32)
    together, _ = whole.choose(whole.logits(hidden, slice(0, 3)), slice(0, 3))
    for layer in range(3):
        for token in range(num_tokens):
            only = slice(layer, layer + 1)
            alone, _ = whole.choose(whole.logits(hidden[[token]], only), only)
            assert alone[0, 0].tolist() == together[layer, token].tolist()
