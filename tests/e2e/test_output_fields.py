"""Log probabilities of every kind and routing come back exactly as from unmodified SGLang."""

import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import VOCAB_SIZE, make_checkpoint
from forking import run_in_fork
from sglang_engine import flush_cache, running_engine
from sglmoe_engine import running_sglmoe

pytestmark = pytest.mark.usefixtures("preloaded")

CHOOSER = random.Random(11)
# Four chunks of 64 tokens; two shorter ones that share a batch.
PROMPTS = [[CHOOSER.randrange(5, VOCAB_SIZE) for _ in range(n)] for n in (250, 90, 30)]
FIELDS = (
    "input_token_logprobs",
    "input_top_logprobs",
    "input_token_ids_logprobs",
    "output_token_logprobs",
    "output_top_logprobs",
    "output_token_ids_logprobs",
    "routed_experts",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
)
ASKED: dict[str, dict[str, Any]] = {
    "prompt logprobs": {"return_logprob": True, "logprob_start_len": 0},
    "from the middle on": {"return_logprob": True, "logprob_start_len": 20},
    "top": {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3},
    "picked": {"return_logprob": True, "logprob_start_len": 25, "token_ids_logprob": [5, 9]},
    "output only": {"return_logprob": True, "top_logprobs_num": 2},
    "routing": {"return_routed_experts": True},
    "prompt only": {"return_logprob": True, "logprob_start_len": 0, "max_new_tokens": 0},
    "score": {"return_logprob": True, "token_ids_logprob": [5, 9], "max_new_tokens": 0},
}


def ask_all(engine: Any) -> dict[str, Any]:
    """One prompt at a time, so that batches are the same on both engines."""
    answers = {}
    for name, asked in ASKED.items():
        asked = dict(asked)
        sampling = {"temperature": 0, "max_new_tokens": asked.pop("max_new_tokens", 6)}
        for prompt in PROMPTS:
            flush_cache(engine)
            output = engine.generate(input_ids=prompt, sampling_params=sampling, **asked)
            fields = {field: output["meta_info"].get(field) for field in FIELDS}
            answers[f"{name}, {len(prompt)}"] = (output["output_ids"], fields)
    return answers


def ask_sglang(model_dir: Path, **flags: Any) -> dict[str, Any]:
    with running_engine(model_dir, **flags) as engine:
        return ask_all(engine)


def ask_sglmoe(model_dir: Path, **flags: Any) -> dict[str, Any]:
    with running_sglmoe(model_dir, memory_budget="8MB", **flags) as engine:
        return ask_all(engine)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_every_field_is_that_of_unmodified_sglang(family: str, tmp_path: Path) -> None:
    model_dir = run_in_fork(make_checkpoint, family, tmp_path, dtype="float32", attention_gain=1.0)
    flags = {
        "dtype": "float32",
        "chunked_prefill_size": 64,
        "enable_return_routed_experts": True,
    }
    theirs = run_in_fork(ask_sglang, model_dir, **flags)
    ours = run_in_fork(ask_sglmoe, model_dir, **flags)
    assert ours.keys() == theirs.keys()
    for name, answer in theirs.items():
        assert ours[name] == answer, name
