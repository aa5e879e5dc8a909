"""The unmodified server on our CPU platform answers as transformers do, for every family.

What we compare our own server with is right, then, and not merely the same.
"""

import random
from pathlib import Path

import pytest
from checkpoints import FAMILIES, VOCAB_SIZE, make_checkpoint
from forking import run_in_fork
from reference import hf_gaps, hf_greedy, hf_logprobs
from sglang_engine import greedy_answers

NUM_TOKENS = 24

pytestmark = pytest.mark.usefixtures("preloaded")


def random_prompts(*lengths: int) -> list[list[int]]:
    chooser = random.Random(5)
    return [[chooser.randrange(5, VOCAB_SIZE) for _ in range(length)] for length in lengths]


PROMPTS = random_prompts(3, 40, 300)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_follows_the_whole_context_as_transformers_do(family: str, tmp_path: Path) -> None:
    # Red if attention, rope, routing, shared experts or norms of a family go wrong on a CPU.
    model_dir = run_in_fork(make_checkpoint, family, tmp_path, dtype="float32", attention_gain=1.0)
    expected = run_in_fork(hf_greedy, model_dir, PROMPTS, NUM_TOKENS)
    answers = run_in_fork(greedy_answers, model_dir, PROMPTS, NUM_TOKENS, dtype="float32")
    assert [answer.tokens for answer in answers] == expected
    longest, answer = PROMPTS[-1], answers[-1]
    logprobs = run_in_fork(hf_logprobs, model_dir, longest + answer.tokens)
    assert answer.prompt_logprobs + answer.logprobs == pytest.approx(logprobs, abs=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_chooses_the_same_tokens(family: str, dtype: str, tmp_path: Path) -> None:
    # The margins of `make_checkpoint` make this fair. Red if a dtype is cast wrongly on the way.
    model_dir = run_in_fork(make_checkpoint, family, tmp_path, dtype=dtype)
    expected = run_in_fork(hf_greedy, model_dir, PROMPTS, NUM_TOKENS)
    answers = run_in_fork(greedy_answers, model_dir, PROMPTS, NUM_TOKENS, dtype=dtype)
    assert [answer.tokens for answer in answers] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_leave_no_near_ties(family: str, tmp_path: Path) -> None:
    # bfloat16 moves these logits by about 0.05.
    model_dir = run_in_fork(make_checkpoint, family, tmp_path)
    assert min(run_in_fork(hf_gaps, model_dir, PROMPTS, 64)) > 0.3
