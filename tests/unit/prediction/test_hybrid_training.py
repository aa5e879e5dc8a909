"""Training the hybrid predictor: 3 layers of 4 experts, 2 of which a token uses; 4 tokens."""

import numpy as np
import pytest
import torch

from sglmoe.prediction.hybrid import Hybrid, HybridParameters, heads_of, predicted_logits
from sglmoe.prediction.hybrid_training import (
    HybridExamples,
    HybridRecipe,
    activation,
    fit_hybrid,
    in_numpy,
    initial_parameters,
    random_pairs,
)
from sglmoe.prediction.predictor import LayerRouting, ModelParts, StepTokens
from sglmoe.prediction.pregate import Pregate, choice_margins
from sglmoe.prediction.router import Router

RANDOM = np.random.default_rng(0)
EMBEDDINGS = 2 * np.eye(4, dtype=np.float32)
PARTS = ModelParts(num_layers=3, num_experts=4, top_k=2, embed=lambda ids: EMBEDDINGS[ids])
ROUTER = Router(RANDOM.normal(size=(3, 4, 4)).astype(np.float32), 2)
RECIPE = HybridRecipe(horizon=2, width=32, num_epochs=6, batch_tokens=64)


def examples(num_tokens: int) -> HybridExamples:
    """Tokens whose experts follow from their ids, whatever the gates are shown."""
    token_ids = RANDOM.integers(0, 4, num_tokens)
    in_layer = [(token_ids + layer) % 4 for layer in range(3)]
    expert_ids = np.stack([[first, (first + 1) % 4] for first in in_layer]).transpose(2, 0, 1)
    inputs = RANDOM.normal(size=(num_tokens, 3, 4)).astype(np.float32)
    return HybridExamples(token_ids.astype(np.int32), inputs, expert_ids.astype(np.uint8))


def fit(data: HybridExamples, recipe: HybridRecipe = RECIPE) -> HybridParameters:
    assert PARTS.embed is not None
    return fit_hybrid(data, ROUTER, PARTS.embed, recipe)


def share_found(predictor: Hybrid | Pregate, data: HybridExamples) -> float:
    """Of the experts that tokens use after the first layer, among as many predicted behind it."""
    found = 0
    for token in range(len(data.token_ids)):
        zeros = np.zeros(1, np.int32)
        predictor.begin_step(StepTokens(data.token_ids[[token]], zeros, zeros))
        routing = data.expert_ids[[token], 0], np.zeros((1, 4)), data.gate_inputs[[token], 0]
        predictor.observe(LayerRouting(0, *routing))
        for layer in (1, 2):
            best = np.argsort(-predictor.scores()[layer])[:2]
            found += len(set(best.tolist()) & set(data.expert_ids[token, layer].tolist()))
    return found / (4 * len(data.token_ids))


def test_it_learns_what_gates_cannot_tell() -> None:
    learned = Hybrid(PARTS, ROUTER, fit(examples(1000)), window_tokens=0)
    others = examples(100)
    assert share_found(Pregate(PARTS, ROUTER), others) < 0.65  # chance is a half
    assert share_found(learned, others) > 0.99


def test_untrained_it_predicts_as_pregate_does() -> None:
    start = in_numpy(initial_parameters(ROUTER, RECIPE, torch.Generator().manual_seed(0)))
    data = examples(50)
    hybrid = share_found(Hybrid(PARTS, ROUTER, start, window_tokens=0), data)
    assert hybrid == share_found(Pregate(PARTS, ROUTER), data)


def test_serving_computes_what_was_trained() -> None:
    generator = torch.Generator().manual_seed(1)
    trained = initial_parameters(ROUTER, RECIPE, generator)
    trained = HybridParameters(
        **{
            name: torch.randn(getattr(trained, name).shape, generator=generator)
            for name in HybridParameters.__struct_fields__
        }
    )
    data = examples(1)
    hybrid = Hybrid(PARTS, ROUTER, in_numpy(trained))
    zeros = np.zeros(1, np.int32)
    hybrid.begin_step(StepTokens(data.token_ids, zeros, zeros))
    chosen = torch.from_numpy(data.expert_ids.astype(np.int64))
    token = torch.from_numpy(EMBEDDINGS[data.token_ids]) @ trained.token
    for layer in (0, 1):
        routing = data.expert_ids[:, layer], np.zeros((1, 4)), data.gate_inputs[:, layer]
        hybrid.observe(LayerRouting(layer, *routing))
        for target in range(layer + 1, 3):
            only = slice(target, target + 1)
            margins = torch.from_numpy(choice_margins(ROUTER, data.gate_inputs[:, layer], only))
            pair = torch.tensor([target]), torch.tensor([target - layer])
            context = token + activation(trained, chosen)[[layer]]
            logits = predicted_logits(heads_of(trained, *pair), margins, context)
            np.testing.assert_allclose(
                hybrid.scores()[target], torch.sigmoid(logits[0, 0]), rtol=1e-4, atol=1e-6
            )


def test_the_same_seed_gives_the_same_parameters() -> None:
    data = examples(200)
    one, same, other = (
        fit(data, HybridRecipe(horizon=1, width=4, num_epochs=1, seed=seed)) for seed in (1, 1, 2)
    )
    assert (one.output == same.output).all()
    assert (one.output != other.output).any()
    assert one.horizon == 1


def test_progress_is_told_to_the_end() -> None:
    told: list[tuple[int, int]] = []
    assert PARTS.embed is not None
    fit_hybrid(
        examples(130),
        ROUTER,
        PARTS.embed,
        HybridRecipe(width=2, num_epochs=2, batch_tokens=64),
        lambda done, total, loss: told.append((done, total)),
    )
    assert told == [(done, 6) for done in range(1, 7)]


def test_pairs_stay_within_the_model_and_the_horizon() -> None:
    generator = torch.Generator().manual_seed(0)
    distances = set()
    for _ in range(200):
        sources, distance = random_pairs(4, 2, generator)
        assert sources.tolist() == [0, 1, 2]
        distances |= set(zip(sources.tolist(), distance.tolist(), strict=True))
    assert distances == {(0, 1), (0, 2), (1, 1), (1, 2), (2, 1)}


def test_there_must_be_something_to_learn() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        fit(examples(0))
