"""FineMoE's formulas with numbers, and the search against one written as the paper does."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglmoe.prediction.expert_map import (
    ExpertMap,
    mass_ahead,
    plan_places,
    redundancy,
    threshold,
)
from sglmoe.prediction.predictor import LayerRouting, ModelParts, StepTokens

# Tokens 0 and 1 have nothing in common, 2 is like 0 with a cosine of 0.25.
EMBEDDINGS = np.array([[2, 0], [0, 3], [0.25, np.sqrt(1 - 0.25**2)]], np.float32)
FALLING = [0.6, 0.25, 0.1, 0.05]
RISING = [0.05, 0.1, 0.25, 0.6]
EVEN = [0.3, 0.2, 0.3, 0.2]


def parts(num_layers: int = 2, *, top_k: int = 1, has_embeddings: bool = True) -> ModelParts:
    embed = (lambda ids: EMBEDDINGS[ids]) if has_embeddings else None
    return ModelParts(num_layers, 4, top_k, embed)


def begin(predictor: ExpertMap, token_ids: list[int]) -> None:
    array = np.array(token_ids, np.int32)
    predictor.begin_step(StepTokens(array, np.zeros_like(array), np.zeros_like(array)))


def observe(predictor: ExpertMap, layer: int, *probabilities: list[float]) -> None:
    rows = np.array(probabilities, np.float16)  # as in traces
    predictor.observe(LayerRouting(layer, rows.argmax(1)[:, np.newaxis], rows))


def step(predictor: ExpertMap, token_id: int, *layers: list[float]) -> None:
    begin(predictor, [token_id])
    for layer, probabilities in enumerate(layers):
        observe(predictor, layer, probabilities)


def scores(predictor: ExpertMap, layer: int) -> Any:
    return pytest.approx(predictor.scores()[layer].tolist(), abs=1e-3)  # float16


# Section 4.4.


def test_delta_is_what_is_missing_to_a_perfect_match() -> None:
    similarity = np.array([1, 0.75, 0, -0.5, 1.0000001], np.float32)
    assert threshold(similarity).tolist() == [0, 0.25, 1, 1, 0]


@pytest.mark.parametrize(
    ("delta", "top_k", "selected"),
    [
        (0.0, 1, [1]),  # at least K
        (0.0, 2, [1, 3]),
        (0.35, 1, [1]),  # 0.4 is enough
        (0.45, 1, [1, 3]),  # 0.4 is not, 0.7 is
        (0.75, 1, [1, 2, 3]),
        (1.0, 1, [0, 1, 2, 3]),
    ],
)
def test_experts_are_selected_until_their_sum_reaches_delta(
    delta: float, top_k: int, selected: list[int]
) -> None:
    probabilities = np.array([0.1, 0.4, 0.2, 0.3], np.float32)
    ahead = mass_ahead(probabilities, top_k)
    assert np.flatnonzero(ahead < delta).tolist() == selected


def test_redundancy_weighs_similarities_by_the_layers_they_predict() -> None:
    one = np.array([[0.9]], np.float32)
    other = np.array([[0.6]], np.float32)
    # d = 1 of L = 3: 0.9 / 3 + 0.6 * 2 / 3
    assert redundancy(one, other, distance=1, num_layers=3) == pytest.approx(0.7)


def test_new_maps_replace_the_most_redundant_one_after_the_other() -> None:
    to_stored = np.array([[0.1, 0.9], [0.2, 0.8], [0.95, 0.3]], np.float32)
    among_new = np.array([[1, 0.85, 0.4], [0.85, 1, 0.5], [0.4, 0.5, 1]], np.float32)
    # The first one finds the last empty place; the second one is most like the first; the third
    # one most like the oldest.
    assert plan_places(to_stored, among_new, capacity=3) == [2, 2, 0]
    assert plan_places(to_stored, among_new, capacity=5) == [2, 3, 4]
    assert plan_places(np.zeros((2, 0), np.float32), among_new[:2, :2], capacity=1) == [0, 0]


# Search and selection together. d = 1: the first layer by meaning, the second by trajectory.


def test_an_empty_store_predicts_nothing() -> None:
    predictor = ExpertMap(parts(), prefetch_distance=1)
    begin(predictor, [0])
    assert not predictor.scores().any()
    observe(predictor, 0, FALLING)
    assert not predictor.scores().any()


def test_a_token_seen_before_goes_where_it_went() -> None:
    predictor = ExpertMap(parts(), prefetch_distance=1)
    step(predictor, 0, FALLING, RISING)
    begin(predictor, [0])
    assert scores(predictor, 0) == [0.6, 0, 0, 0]
    assert scores(predictor, 1) == [0, 0, 0, 0]  # no trajectory yet
    observe(predictor, 0, FALLING)
    assert scores(predictor, 1) == [0, 0, 0, 0.6]


def test_what_resembles_less_predicts_more() -> None:
    predictor = ExpertMap(parts(), prefetch_distance=1)
    step(predictor, 0, FALLING, RISING)
    begin(predictor, [2])
    # delta = 0.75: 0.6 is not enough.
    assert scores(predictor, 0) == [0.6, 0.25, 0, 0]


def test_after_the_first_layers_the_trajectory_counts_and_the_meaning_no_more() -> None:
    predictor = ExpertMap(parts(), prefetch_distance=1)
    step(predictor, 0, FALLING, FALLING)
    step(predictor, 1, RISING, RISING)
    begin(predictor, [0])
    assert scores(predictor, 0) == [0.6, 0, 0, 0]
    observe(predictor, 0, RISING)
    assert scores(predictor, 1) == [0, 0, 0, 0.6]


def test_the_first_d_layers_stay_with_the_meaning() -> None:
    predictor = ExpertMap(parts(3), prefetch_distance=2)
    step(predictor, 0, FALLING, FALLING, FALLING)
    step(predictor, 1, RISING, RISING, RISING)
    begin(predictor, [0])
    observe(predictor, 0, RISING)
    assert scores(predictor, 1) == [0.6, 0, 0, 0]
    assert scores(predictor, 2) == [0, 0, 0, 0.6]


def test_without_embeddings_the_first_layers_have_no_prediction() -> None:
    predictor = ExpertMap(parts(3, has_embeddings=False), prefetch_distance=2)
    step(predictor, 0, FALLING, RISING, RISING)
    begin(predictor, [0])
    assert not predictor.scores().any()
    observe(predictor, 0, FALLING)
    assert scores(predictor, 1) == [0, 0, 0, 0]
    assert scores(predictor, 2) == [0, 0, 0, 0.6]


def test_a_step_uses_what_any_of_its_tokens_uses() -> None:
    predictor = ExpertMap(parts(top_k=2), prefetch_distance=1)
    step(predictor, 0, FALLING, RISING)
    step(predictor, 1, EVEN, EVEN)
    begin(predictor, [0, 1])
    # Token 0: 0.6, 0.25; token 1: 0.3 for the first and the third.
    assert scores(predictor, 0) == [1 - 0.4 * 0.7, 0.25, 0.3, 0]


def test_each_token_of_a_prompt_is_stored_up_to_a_bound() -> None:
    predictor = ExpertMap(parts(), prefetch_distance=1, max_tokens=2)
    begin(predictor, [1, 0, 1, 2])  # of these the second and the last
    observe(predictor, 0, EVEN, FALLING, EVEN, RISING)
    observe(predictor, 1, EVEN, RISING, EVEN, FALLING)
    assert predictor.num_maps == 2
    begin(predictor, [0])
    assert scores(predictor, 0) == [0.6, 0, 0, 0]
    begin(predictor, [2])
    assert scores(predictor, 0) == [0, 0, 0, 0.6]


def test_a_full_store_replaces_what_is_most_alike() -> None:
    predictor = ExpertMap(parts(), prefetch_distance=1, capacity=2)
    step(predictor, 0, FALLING, FALLING)
    step(predictor, 1, RISING, RISING)
    step(predictor, 1, RISING, EVEN)
    assert predictor.num_maps == 2
    begin(predictor, [0])
    observe(predictor, 0, FALLING)
    assert scores(predictor, 1) == [0.6, 0, 0, 0]  # still there
    begin(predictor, [1])
    observe(predictor, 0, RISING)
    assert predictor.scores()[1, 3] < 0.3  # replaced


def test_a_map_may_replace_one_of_its_own_step() -> None:
    predictor = ExpertMap(parts(has_embeddings=False), prefetch_distance=1, capacity=2)
    step(predictor, 0, FALLING, FALLING)
    step(predictor, 0, RISING, RISING)
    begin(predictor, [0, 0])
    observe(predictor, 0, RISING, RISING)
    observe(predictor, 1, EVEN, FALLING)  # the first one replaces RISING, RISING
    begin(predictor, [0])
    observe(predictor, 0, RISING)
    assert scores(predictor, 1) == [0.6, 0, 0, 0]  # of the second one
    begin(predictor, [0])
    observe(predictor, 0, FALLING)
    assert scores(predictor, 1) == [0.6, 0, 0, 0]  # of the oldest one


def test_a_step_that_breaks_off_is_not_stored() -> None:
    predictor = ExpertMap(parts(), prefetch_distance=1)
    step(predictor, 0, FALLING)
    step(predictor, 0, RISING, RISING)
    assert predictor.num_maps == 1


def test_scores_once_given_do_not_change() -> None:
    predictor = ExpertMap(parts(), prefetch_distance=1)
    step(predictor, 0, FALLING, RISING)
    begin(predictor, [0])
    kept = predictor.scores()
    observe(predictor, 0, FALLING)
    predictor.scores()
    observe(predictor, 1, RISING)
    assert kept[1].tolist() == [0, 0, 0, 0]


# The same search, layer by layer and map by map as in the paper. Layers of 5 experts, all maps kept.


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b))


def as_in_the_paper(p: np.ndarray, similarity: float, top_k: int) -> np.ndarray:
    delta, selected, total = min(max(1 - similarity, 0), 1), np.zeros_like(p), 0.0
    for number, expert in enumerate(np.argsort(-p)):
        if number >= top_k and total >= delta:
            break
        selected[expert] = p[expert]
        total += p[expert]
    return selected


@settings(deadline=None, max_examples=25, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3))
def test_it_finds_what_an_exhaustive_search_finds(seed: int, num_tokens: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    num_layers, top_k = 4, 2
    vectors = rng.standard_normal((50, 3)).astype(np.float32)
    model = ModelParts(num_layers, 5, top_k, lambda ids: vectors[ids])
    predictor = ExpertMap(model, prefetch_distance=d)
    stored: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(4):
        token_ids = rng.integers(0, 50, num_tokens).astype(np.int32)
        logits = rng.standard_normal((num_tokens, num_layers, 5)) * 2
        maps = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        begin(predictor, token_ids.tolist())
        for last in range(-1, num_layers - 1):
            if last >= 0:
                predictor.observe(LayerRouting(last, np.zeros((num_tokens, 2)), maps[:, last]))
            for layer in range(last + 1, num_layers):
                none = np.ones(5)
                for token in range(num_tokens if stored else 0):
                    vector = vectors[token_ids[token]]
                    if layer < d:
                        similarities = [cosine(vector, v) for v, _ in stored]
                    elif last >= 0:
                        seen = maps[token, : last + 1]
                        similarities = [cosine(seen, m[: last + 1]) for _, m in stored]
                    else:
                        continue
                    best = int(np.argmax(similarities))
                    none *= 1 - as_in_the_paper(stored[best][1][layer], similarities[best], top_k)
                assert predictor.scores()[layer] == pytest.approx(1 - none, abs=1e-5)
        predictor.observe(LayerRouting(num_layers - 1, np.zeros((num_tokens, 2)), maps[:, -1]))
        stored += [(vectors[i], m) for i, m in zip(token_ids, maps, strict=True)]
