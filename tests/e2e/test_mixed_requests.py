"""16 requests of every kind at once come out as each does alone on unmodified SGLang."""

import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import VOCAB_SIZE, make_checkpoint
from forking import run_in_fork
from sglang_engine import running_engine
from sglmoe_engine import frames_budget, running_sglmoe, state_of

pytestmark = pytest.mark.usefixtures("preloaded")

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
# Kinds of requests that have one right answer.
KINDS: list[dict[str, Any]] = [
    {},
    {"frequency_penalty": 0.7, "presence_penalty": 0.4},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 12, "ignore_eos": False},
    {"logit_bias": {"77": 4.0}},
    {"regex": "[a-f]{3,8}[0-9]{4}", "ignore_eos": False},
    {"json_schema": '{"type": "array", "items": {"type": "integer"}, "maxItems": 3}'},
    {"stop": ["e"], "ignore_eos": False},
    {"top_k": 1, "temperature": 0.9},
]


def mixed_requests() -> list[tuple[list[int], dict[str, Any]]]:
    chooser = random.Random(3)
    return [
        (
            [chooser.randrange(5, VOCAB_SIZE) for _ in range(chooser.randrange(2, 120))],
            GREEDY | KINDS[i % len(KINDS)],
        )
        for i in range(16)
    ]


def answers(model_dir: Path, memory_budget: str) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Each alone, all together, and the state of memory in the end."""
    requests = mixed_requests()
    with running_sglmoe(
        model_dir, dtype="float32", memory_budget=memory_budget, enable_return_routed_experts=True
    ) as engine:
        alone = [
            engine.generate(input_ids=ids, sampling_params=params)["output_ids"]
            for ids, params in requests
        ]
        engine.flush_cache()
        together = engine.generate(
            input_ids=[ids for ids, _ in requests],
            sampling_params=[params for _, params in requests],
            return_logprob=[i % 3 == 0 for i in range(16)],
            return_routed_experts=True,
        )
        return alone, [output["output_ids"] for output in together], state_of(engine)


def answers_of_sglang(model_dir: Path) -> list[Any]:
    with running_engine(model_dir, dtype="float32") as engine:
        return [
            engine.generate(input_ids=ids, sampling_params=params)["output_ids"]
            for ids, params in mixed_requests()
        ]


def test_mixed_requests_match_their_solo_runs(tmp_path: Path) -> None:
    model_dir = run_in_fork(
        make_checkpoint, "qwen3_moe", tmp_path, dtype="float32", attention_gain=1.0
    )
    theirs = run_in_fork(answers_of_sglang, model_dir)
    roomy_alone, roomy_together, roomy = run_in_fork(answers, model_dir, "200MB")
    # Alone against alone: a penalty that is never counted would be the same alone and together.
    assert roomy_alone == theirs
    assert roomy_together == roomy_alone
    assert len({tuple(tokens) for tokens in roomy_alone}) == 16
    # 20 frames: 16 requests of up to 144 tokens take turns, and most experts are absent.
    budget = frames_budget(roomy, 20)
    tight_alone, tight_together, tight = run_in_fork(answers, model_dir, budget)
    assert tight_alone == roomy_alone
    assert tight_together == roomy_alone
    assert tight["memory"]["experts_evicted"] > 0
    assert tight["memory"]["num_split_layers"] > 0
