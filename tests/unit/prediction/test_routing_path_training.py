"""The examples that a trace gives, and what is learned from them."""

import numpy as np
import pytest
import torch
from tiny_traces import experts_of, random_trace, trace_of
from torch.nn import functional as F

from sglmoe.prediction.routing_path_model import Dimensions
from sglmoe.prediction.routing_path_training import (
    Recipe,
    batch_of,
    examples_of,
    fit,
    logits_of,
    loss_of,
    rate_ratio,
)
from sglmoe.prediction.trace import Trace
from sglmoe.prediction.training_data import TracePart

TINY = Dimensions(
    num_layers=2,
    num_experts=4,
    vocab_size=11,
    d_model=8,
    d_ff=32,
    d_kv=4,
    num_heads=2,
)


def part_of(trace: Trace, *requests: int) -> TracePart:
    counts = np.zeros(1 + int(trace.owners.max()), bool)
    counts[list(requests)] = True
    return TracePart("tiny", trace, counts)


def test_requests_are_taken_apart_as_a_server_shows_them() -> None:
    # 0: a prompt in two chunks, preempted after one token. 1: begins behind a cached prefix. 2: not asked for.
    trace = trace_of(
        [
            [(0, 0, [1, 2]), (1, 8, [7]), (2, 0, [9, 9])],
            [(0, 2, [3, 4]), (1, 9, [8])],
            [(0, 4, [5]), (1, 10, [9])],
            [(0, 0, [1, 2, 3, 4, 5, 6])],
            [(0, 6, [7])],
        ]
    )
    examples = examples_of(part_of(trace, 0, 1))
    texts = [(its.prompt.tolist(), its.generated.tolist()) for its in examples]
    assert texts == [([1, 2, 3, 4], [5]), ([1, 2, 3, 4, 5, 6], [7]), ([7], [8, 9])]
    for its in examples:
        assert (its.prompt_experts == experts_of(its.prompt)).all()
        assert (its.generated_experts == experts_of(its.generated)).all()


def test_a_chunk_of_one_token_is_taken_for_an_answer_until_the_prompt_goes_on() -> None:
    trace = trace_of([[(0, 0, [1, 2])], [(0, 2, [3])], [(0, 3, [4, 5])], [(0, 5, [6])]])
    (its,) = examples_of(part_of(trace, 0))
    assert (its.prompt.tolist(), its.generated.tolist()) == ([1, 2, 4, 5], [6])


def test_a_batch_has_ends_of_prompts_and_beginnings_of_answers() -> None:
    trace = trace_of(
        [[(0, 0, [1, 2, 3]), (1, 0, [4, 5])], *[[(0, 3 + i, [6 + i])] for i in range(4)]]
    )
    its = Dimensions(num_layers=2, num_experts=4, vocab_size=11, prompt_tokens=2)
    batch = batch_of(examples_of(part_of(trace, 0, 1)), its, [0.5, 1.0])
    assert batch.prompts.tolist() == [[2, 3], [4, 5]]
    assert batch.generated.tolist() == [[6, 7], [0, 0]]
    assert batch.generated_lengths.tolist() == [2, 0]
    expected = experts_of(np.array([2, 3, 4, 5, 6, 7], np.int32))
    assert batch.experts.tolist() == expected.tolist()


def test_the_loss_is_binary_cross_entropy() -> None:
    logits = torch.randn(3, 2, 4)
    experts = torch.tensor([[[0, 1], [1, 2]], [[3, 0], [0, 1]], [[2, 3], [3, 0]]])
    truth = torch.zeros(3, 2, 4).scatter_(2, experts, 1.0)
    expected = F.binary_cross_entropy_with_logits(logits, truth)
    torch.testing.assert_close(loss_of(logits, experts), expected)


def test_what_is_padded_changes_no_prediction() -> None:
    torch.manual_seed(0)
    examples = examples_of(part_of(random_trace(6, seed=1), *range(6)))
    model, _ = fit(examples, examples, TINY, Recipe(epochs=1))
    with torch.inference_mode():
        together = logits_of(model, batch_of(examples, TINY, [1.0] * 6))
        alone = [logits_of(model, batch_of([its], TINY, [1.0])) for its in examples]
    lengths = [len(its.prompt) for its in examples]
    prompts = torch.cat([its[:n] for its, n in zip(alone, lengths, strict=True)])
    generated = torch.cat([its[n:] for its, n in zip(alone, lengths, strict=True)])
    torch.testing.assert_close(together, torch.cat([prompts, generated]), atol=1e-5, rtol=0)


def test_the_rate_warms_up_and_goes_down_to_nothing() -> None:
    rates = [rate_ratio(step, 10, 0.2) for step in range(11)]
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])


def test_a_rule_is_learned() -> None:
    trace = random_trace(40, seed=0)
    examples = examples_of(part_of(trace, *range(40)))
    # A long warm-up: at the rate it begins with nothing would be learned.
    recipe = Recipe(epochs=8, peak_rate=0.05, warmup_ratio=0.8)
    model, losses = fit(examples[:36], examples[36:], TINY, recipe)
    batch = batch_of(examples[36:], TINY, [1.0] * 4)
    with torch.inference_mode():
        chosen = logits_of(model, batch).topk(2, dim=2).indices.sort(dim=2).values
    recall = (chosen == batch.experts.sort(dim=2).values).float().mean()
    assert recall > 0.99
    assert losses[-1]["held_out"] < 0.1 < losses[0]["train"]


def test_the_same_seed_gives_the_same_model() -> None:
    examples = examples_of(part_of(random_trace(6, seed=1), *range(6)))
    first, second, other = (
        fit(examples, examples, TINY, Recipe(epochs=1, seed=seed))[1] for seed in (0, 0, 1)
    )
    assert first == second != other
