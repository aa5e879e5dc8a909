"""Teaches the hybrid predictor what gates answered later to what it asked them early."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from sglmoe.errors import predictors
from sglmoe.prediction.hybrid import (
    RECENCY,
    HybridParameters,
    heads_of,
    normalised,
    predicted_logits,
)
from sglmoe.prediction.predictor import Embed
from sglmoe.prediction.pregate import choice_margins, doubts
from sglmoe.prediction.router import Router

OnBatch = Callable[[int, int, float], None]  # batches done, batches in all, loss in nats an expert


class HybridRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """How to train. Compared on the demo model: width 64 and 128, 4 and 8 epochs, rates of 0.003 and 0.01."""

    horizon: int = 8  # layers ahead, where the model has as many
    width: int = 128
    num_epochs: int = 8
    batch_tokens: int = 512
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    seed: int = 0


class HybridExamples(msgspec.Struct, frozen=True, eq=False):
    """T tokens of traces. Arrays may be mapped files: batches are read from them as they are drawn."""

    token_ids: npt.NDArray[Any]  # [T], integers
    gate_inputs: npt.NDArray[Any]  # [T, L, hidden], floats
    expert_ids: npt.NDArray[Any]  # [T, L, top_k], integers


def fit_hybrid(
    examples: HybridExamples,
    router: Router,
    embed: Embed,
    recipe: HybridRecipe,
    on_batch: OnBatch = lambda done, total, loss: None,
) -> HybridParameters:
    """The parameters after training, as numpy arrays.

    In each batch every layer is asked for one layer ahead, at a random distance: as good as all
    distances at a fraction of the time. Raises ValueError for fewer than two layers or no tokens.
    """
    num_tokens, num_layers, _ = examples.gate_inputs.shape
    if num_layers < 2 or not num_tokens:
        raise predictors.nothing_to_learn(num_tokens=num_tokens, num_layers=num_layers)
    generator = torch.Generator().manual_seed(recipe.seed)
    parameters = initial_parameters(router, recipe, generator)
    optimizer = torch.optim.AdamW(
        [getattr(parameters, name) for name in HybridParameters.__struct_fields__],
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
    )
    num_batches = recipe.num_epochs * -(-num_tokens // recipe.batch_tokens)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_batches)
    done = 0
    for _ in range(recipe.num_epochs):
        for places in torch.randperm(num_tokens, generator=generator).split(recipe.batch_tokens):
            loss = batch_loss(parameters, examples, router, embed, places, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            on_batch(done, num_batches, loss.item())
    return in_numpy(parameters)


def initial_parameters(
    router: Router, recipe: HybridRecipe, generator: torch.Generator
) -> HybridParameters:
    """Those that predict what plain pre-gating does: no deviation."""
    num_layers, num_experts, hidden_size = router.weights.shape
    horizon, width = min(recipe.horizon, num_layers - 1), recipe.width

    def noise(*shape: int, scale: float) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).requires_grad_()

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, requires_grad=True)

    return HybridParameters(
        token=noise(hidden_size, width, scale=hidden_size**-0.5),
        recent=noise(num_layers, num_experts, width, scale=0.2),
        gate=noise(num_layers, num_experts, width, scale=num_experts**-0.5),
        offset=noise(horizon, num_layers, width, scale=0.1),
        output=zeros(num_layers, width, num_experts),
        bias=zeros(horizon, num_layers, num_experts),
        slope=torch.from_numpy(1 / doubts(horizon)).requires_grad_(),
    )


def batch_loss(
    parameters: HybridParameters,
    examples: HybridExamples,
    router: Router,
    embed: Embed,
    places: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Cross entropy in nats an expert: was it chosen by the token in the layer asked for?"""
    rows = places.sort().values.numpy()
    chosen = torch.from_numpy(examples.expert_ids[rows].astype(np.int64))
    hidden = examples.gate_inputs[rows].astype(np.float32)
    sources, distances = random_pairs(hidden.shape[1], parameters.horizon, generator)
    targets = sources + distances
    margins = [
        choice_margins(router, hidden[:, source], slice(target, target + 1))[0]
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True)
    ]
    tokens = normalised(embed(examples.token_ids[rows].astype(np.int32)))
    context = torch.from_numpy(tokens) @ parameters.token + activation(parameters, chosen)[sources]
    heads = heads_of(parameters, targets, distances)
    logits = predicted_logits(heads, torch.from_numpy(np.stack(margins)), context)
    was_chosen = torch.zeros_like(logits).scatter_(2, chosen[:, targets].transpose(0, 1), 1.0)
    return F.binary_cross_entropy_with_logits(logits, was_chosen)


def random_pairs(
    num_layers: int, horizon: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every layer but the last, and for each a distance that it can be asked over: int64 [L - 1]."""
    sources = torch.arange(num_layers - 1)
    farthest = (num_layers - 1 - sources).clamp(max=horizon)
    return sources, 1 + (torch.rand(num_layers - 1, generator=generator) * farthest).long()


def activation(parameters: HybridParameters, chosen: torch.Tensor) -> torch.Tensor:
    """What a token's experts have left after each layer, [L, T, width]. `chosen`: [T, L, top_k]."""
    num_tokens, num_layers, top_k = chosen.shape
    _, num_experts, width = parameters.recent.shape
    rows = chosen + num_experts * torch.arange(num_layers)[:, None]
    sums = F.embedding_bag(rows.view(-1, top_k), parameters.recent.flatten(0, 1), mode="sum")
    layers_since = torch.arange(num_layers)[:, None] - torch.arange(num_layers)
    left = torch.where(layers_since < 0, 0.0, RECENCY ** layers_since.float())
    return torch.einsum("lj,tjw->ltw", left, sums.view(num_tokens, num_layers, width))


def in_numpy(parameters: HybridParameters) -> HybridParameters:
    names = HybridParameters.__struct_fields__
    return HybridParameters(**{n: getattr(parameters, n).detach().numpy() for n in names})
