"""What the unmodified server can do on a CPU only with our platform: red if a kernel goes missing.

One engine answers one request of each kind; each test looks at some of the answers.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from forking import run_in_fork
from sglang_engine import greedy, running_engine

PROMPT = list(range(100, 140))
SAMPLINGS = {
    "temperature": {"temperature": 1.0},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_p": {"temperature": 1.0, "top_p": 0.5},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "repetition_penalty": {"temperature": 0.0, "repetition_penalty": 1.5},
    "frequency_penalty": {"temperature": 0.0, "frequency_penalty": 1.5},
    "min_new_tokens": {"temperature": 0.0, "min_new_tokens": 5},
    "logit_bias": {"temperature": 0.0, "logit_bias": {"77": 100.0}},
}
JSON_SCHEMA = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}'
GRAMMARS = {
    "regex": {"regex": "(ab|cd){4}"},
    "ebnf": {"ebnf": 'root ::= "yes" | "no"'},
    "json_schema": {"json_schema": JSON_SCHEMA},
}


def answers(model_dir: Path) -> dict[str, Any]:
    """One answer of each kind, by name. Runs in a fork."""
    server_args = {
        "enable_return_routed_experts": True,
        "constrained_json_disable_any_whitespace": True,
    }
    with running_engine(model_dir, **server_args) as engine:

        def ask(sampling: dict[str, Any], **request: Any) -> Any:
            return engine.generate(input_ids=PROMPT, sampling_params=sampling, **request)

        by_name = {name: ask(greedy(8) | sampling) for name, sampling in SAMPLINGS.items()}
        for name, grammar in GRAMMARS.items():
            by_name[name] = ask({"temperature": 0.0, "max_new_tokens": 30, **grammar})
        by_name["routed_experts"] = ask(greedy(4), return_routed_experts=True)
        by_name["logprobs"] = ask(greedy(4), return_logprob=True, top_logprobs_num=2)
    return by_name


@pytest.fixture(scope="module")
def answered(preloaded: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model_dir = run_in_fork(make_checkpoint, "qwen2_moe", tmp_path_factory.mktemp("model"))
    return run_in_fork(answers, model_dir)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_every_way_of_sampling_answers(answered: dict[str, Any], name: str) -> None:
    assert len(answered[name]["output_ids"]) == 8


def test_grammars_constrain(answered: dict[str, Any]) -> None:
    assert re.fullmatch("(ab|cd){4}", answered["regex"]["text"])
    assert answered["ebnf"]["text"] in {"yes", "no"}
    assert json.loads(answered["json_schema"]["text"])["a"] in {1, 2}


def test_routed_experts_come_back(answered: dict[str, Any]) -> None:
    # int32 [tokens but the last, 3 layers, 4 experts per token], base64.
    routed = base64.b64decode(answered["routed_experts"]["meta_info"]["routed_experts"])
    assert len(routed) == (len(PROMPT) + 4 - 1) * 3 * 4 * 4


def test_logprobs_lead_with_the_chosen_token(answered: dict[str, Any]) -> None:
    meta = answered["logprobs"]["meta_info"]
    chosen = [token for _, token, _ in meta["output_token_logprobs"]]
    assert [top[0][1] for top in meta["output_top_logprobs"]] == chosen


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0, from its definition; `data` is whole words."""
    state = 0
    for start in range(0, len(data), 4):
        word = int.from_bytes(data[start : start + 4], "little") * 0xCC9E2D51 % 2**32
        state ^= rotate_left(word, 15) * 0x1B873593 % 2**32
        state = (rotate_left(state, 13) * 5 + 0xE6546B64) % 2**32
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B % 2**32
    state = (state ^ state >> 13) * 0xC2B2AE35 % 2**32
    return state ^ state >> 16


def rotate_left(word: int, bits: int) -> int:
    return (word << bits | word >> (32 - bits)) % 2**32


def hashes(seeds: list[int], positions: list[int], num_columns: int) -> list[list[int]]:
    import torch

    from sglmoe.cpu_kernels import murmur_hash32

    hashed = murmur_hash32(
        torch.tensor(seeds, dtype=torch.uint64), torch.tensor(positions), torch.arange(num_columns)
    )
    assert hashed.dtype == torch.uint32
    return [[int(value) for value in row] for row in hashed.tolist()]


def test_seeds_hash_as_on_a_gpu(preloaded: None) -> None:
    # Seeded sampling draws from this hash: with another one, a seed means something else on CUDA.
    seeds, positions, columns = [0, 42, 2**63 + 5], [0, 7, 4095], [0, 1, 2]
    expected = [
        [
            murmur3(
                b"".join(
                    (
                        seed.to_bytes(8, "little"),
                        position.to_bytes(4, "little"),
                        column.to_bytes(4, "little"),
                    )
                )
            )
            for column in columns
        ]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert run_in_fork(hashes, seeds, positions, len(columns)) == expected
