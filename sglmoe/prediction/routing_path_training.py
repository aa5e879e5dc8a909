"""Trains the routing path predictor on what tokens of recorded requests did (He et al., section 3).

Loss, optimizer, clipping and truncation are those of the authors' code. Batches, rates and epochs
were tried on 320 requests of a small model; theirs are for ten thousand requests.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from sglmoe.prediction.routing_path import Part, from_saved, part_of, runs_of, to_saved
from sglmoe.prediction.routing_path_model import Dimensions, RoutingPathModel
from sglmoe.prediction.training_data import Fitted, TracePart, TrainingData

MAX_GENERATED = 512  # tokens of a request in one training step, as theirs


class Recipe(msgspec.Struct, frozen=True):
    """Everything that decides what comes out, beside the examples and the model's dimensions."""

    epochs: int = 20
    seed: int = 0
    batch_requests: int = 4
    peak_rate: float = 4e-3
    table_rate: float = 0.2
    warmup_ratio: float = 0.05  # of all steps; theirs: 5,000 of 93,750
    weight_decay: float = 0.01
    max_gradient_norm: float = 0.8
    shortest_ratio: float = 0.2  # a step sees the first 20 to 100 % of what was generated


class Example(msgspec.Struct, frozen=True, eq=False):
    """A request as the predictor is shown it: what the encoder reads, then the decoder."""

    prompt: npt.NDArray[np.int32]  # [P]
    prompt_experts: npt.NDArray[Any]  # [P, layers, top_k]
    generated: npt.NDArray[np.int32]  # [G]
    generated_experts: npt.NDArray[Any]  # [G, layers, top_k]


class Batch(msgspec.Struct, frozen=True, eq=False):
    """B requests. Of the N tokens that are there, prompts' first, experts int64 [N, layers, top_k]."""

    prompts: Tensor  # int64 [B, P], of which the first so many are there:
    prompt_lengths: Tensor  # [B]
    generated: Tensor  # int64 [B, G], likewise
    generated_lengths: Tensor  # [B]
    experts: Tensor


def examples_of(part: TracePart) -> list[Example]:
    """Of the requests that count; one that was preempted gives several."""
    trace = part.trace
    seen: dict[int, tuple[int, list[int], list[int]]] = {}  # next position; places of its tokens
    finished = []
    for owner, run in trace_runs(part):
        position, num_tokens = int(trace.positions[run.start]), run.stop - run.start
        next_position, prompt, generated = seen.get(owner, (None, [], []))
        kind = part_of(next_position, position, num_tokens)
        if kind is Part.NEW_PROMPT:
            finished.append((prompt, generated))
            prompt, generated = [], []
        elif kind is Part.MORE_PROMPT:
            generated = []  # a chunk of one token: the decoder starts anew
        (generated if kind is Part.GENERATED else prompt).extend(range(run.start, run.stop))
        seen[owner] = (position + num_tokens, prompt, generated)
    finished += [(prompt, generated) for _, prompt, generated in seen.values()]
    return [
        Example(
            trace.token_ids[prompt],
            trace.expert_ids[prompt],
            trace.token_ids[generated],
            trace.expert_ids[generated],
        )
        for prompt, generated in finished
        if prompt
    ]


def trace_runs(part: TracePart) -> Iterator[tuple[int, slice]]:
    """Step by step, each request that counts and where its tokens are."""
    for start, stop in pairwise(part.trace.step_bounds.tolist()):
        for owner, run in runs_of(part.trace.owners[start:stop]):
            if part.requests[owner]:
                yield owner, slice(start + run.start, start + run.stop)


def batch_of(examples: Sequence[Example], its: Dimensions, ratios: Sequence[float]) -> Batch:
    """The ends of their prompts, and these shares of what they generated."""
    kept = []
    for example, ratio in zip(examples, ratios, strict=True):
        prompt = slice(-its.prompt_tokens, None)
        generated = slice(0, min(round(ratio * len(example.generated)), MAX_GENERATED))
        kept.append((example, prompt, generated))
    experts = [example.prompt_experts[prompt] for example, prompt, _ in kept]
    experts += [example.generated_experts[generated] for example, _, generated in kept]
    return Batch(
        *padded([example.prompt[prompt] for example, prompt, _ in kept]),
        *padded([example.generated[generated] for example, _, generated in kept]),
        torch.from_numpy(np.concatenate(experts).astype(np.int64)),
    )


def padded(rows: Sequence[npt.NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """Token ids [B, longest], 0 behind their ends, and lengths [B]."""
    lengths = [len(row) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for row, target, length in zip(rows, ids, lengths, strict=True):
        target[:length] = torch.from_numpy(row)
    return ids, torch.tensor(lengths)


def logits_of(model: RoutingPathModel, batch: Batch) -> Tensor:
    """[N, layers, experts] in the order of the batch's experts."""
    prompts = model.encode(batch.prompts, batch.prompt_lengths)
    generated = model.decode(batch.generated, prompts, batch.prompt_lengths)
    states = [
        states[torch.arange(states.shape[1]) < lengths[:, None]]
        for states, lengths in (
            (prompts, batch.prompt_lengths),
            (generated, batch.generated_lengths),
        )
    ]
    logits: Tensor = model.head(torch.cat(states))
    return logits.unflatten(1, (model.dimensions.num_layers, model.dimensions.num_experts))


def loss_of(logits: Tensor, experts: Tensor) -> Tensor:
    """Binary cross entropy, mean over tokens, layers and experts.

    Of an expert with logit z it is softplus(z), less z where a token used it.
    """
    return (F.softplus(logits).sum() - logits.gather(2, experts).sum()) / logits.numel()


def train_routing_path(data: TrainingData) -> Fitted:
    shape = data.shape
    recipe = Recipe(seed=data.seed, epochs=Recipe().epochs if data.epochs is None else data.epochs)
    model, losses = fit(
        [example for part in data.train for example in examples_of(part)],
        [example for part in data.held_out for example in examples_of(part)],
        Dimensions(shape.num_layers, shape.num_experts, shape.vocab_size),
        recipe,
    )
    settings, tensors = to_saved(model)
    return Fitted(settings, tensors, lambda parts: from_saved(settings, tensors), losses)


def fit(
    examples: Sequence[Example], held_out: Sequence[Example], its: Dimensions, recipe: Recipe
) -> tuple[RoutingPathModel, list[dict[str, float]]]:
    """A trained model, and its losses by epoch. The same for the same seed, machine and threads."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    model = RoutingPathModel(its)
    optimizer = optimizer_for(model, recipe)
    num_batches = -(-len(examples) // recipe.batch_requests)
    num_steps = recipe.epochs * num_batches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_ratio(step, num_steps, recipe.warmup_ratio)
    )
    losses = []
    with tqdm(total=num_steps, unit="step", desc="routing_path") as progress:
        for _ in range(recipe.epochs):
            total = 0.0
            for batch in batches(examples, its, recipe, rng):
                loss = loss_of(logits_of(model, batch), batch.experts)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                total += loss.item()
                progress.update()
            tested = held_out_loss(model, held_out)
            losses.append({"train": total / num_batches, "held_out": tested})
            progress.set_postfix({name: f"{value:.4f}" for name, value in losses[-1].items()})
    return model, losses


def optimizer_for(model: RoutingPathModel, recipe: Recipe) -> torch.optim.Optimizer:
    """Tables, of which a token touches a row or all, take larger steps than what lies between them."""
    tables = [*model.embedding.parameters(), *model.head.parameters()]
    others = [its for its in model.parameters() if all(its is not table for table in tables)]
    return torch.optim.AdamW(
        [{"params": tables, "lr": recipe.table_rate}, {"params": others, "lr": recipe.peak_rate}],
        weight_decay=recipe.weight_decay,
    )


def batches(
    examples: Sequence[Example], its: Dimensions, recipe: Recipe, rng: random.Random
) -> Iterator[Batch]:
    """All examples once, in random order."""
    order = rng.sample(examples, len(examples))
    for start in range(0, len(order), recipe.batch_requests):
        chosen = order[start : start + recipe.batch_requests]
        yield batch_of(chosen, its, [rng.uniform(recipe.shortest_ratio, 1) for _ in chosen])


def held_out_loss(model: RoutingPathModel, examples: Sequence[Example]) -> float:
    with torch.inference_mode():
        total, num_tokens = 0.0, 0
        for example in examples:
            batch = batch_of([example], model.dimensions, [1.0])
            total += loss_of(logits_of(model, batch), batch.experts).item() * len(batch.experts)
            num_tokens += len(batch.experts)
    return total / num_tokens


def rate_ratio(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Linear up to 1, then linear down to 0."""
    warmup_steps = max(1, round(warmup_ratio * num_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (num_steps - step) / max(1, num_steps - warmup_steps)
