"""Sampling on the pretended device: whatever a request asks for, its tokens are those that a CPU gives."""

import time
from array import array
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
from checkpoints import make_checkpoint
from forking import run_in_fork
from loaded_worker import LoadedWorker
from sglang_on_it import sglang_on_it

from sglmoe.protocol import LogprobSpec, NewRequest, Row

pytestmark = pytest.mark.usefixtures("preloaded")

ASKED: list[dict[str, Any]] = [
    {
        "temperature": 0,
        "frequency_penalty": 1.5,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.3,
    },
    {"temperature": 0, "logit_bias": {"7": 50.0}},
    {"temperature": 0, "min_new_tokens": 4, "stop_token_ids": [3]},
    {"temperature": 0.8, "top_k": 1},
    {"temperature": 0.8, "top_p": 0.01, "min_p": 0.5},
    {"temperature": 0, "regex": "[0-9]+"},
]
PROMPT = [5, 9, 2, 7, 1]
STEPS = 3


def sample(model_dir: Path, *, on_device: bool) -> list[list[int | None]]:
    """Tokens of each step."""
    with sglang_on_it() if on_device else nullcontext():
        worker = LoadedWorker(model_dir, dtype="float32", max_running_requests=len(ASKED))
        for number, asked in enumerate(ASKED):
            add(worker, number, asked)
        deadline = time.monotonic() + 30
        while worker._model.has_pending_grammars:
            assert time.monotonic() < deadline
            assert all(not error for _, error in worker._model.ready_grammars())
        lengths = [len(PROMPT) + 1] + [1] * (STEPS - 1)
        steps = [
            worker.step(*(Row(f"r{number}", length) for number in range(len(ASKED))))
            for length in lengths
        ]
        return [[row.token_id for row in step.rows] for step in steps]


def add(worker: LoadedWorker, number: int, asked: dict[str, Any]) -> None:
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(max_new_tokens=STEPS, ignore_eos=True, **asked)
    sampling.normalize(worker._model._sampling._tokenizer)
    request = NewRequest(
        rid=f"r{number}",
        prompt_ids=array("i", [*PROMPT, number]).tobytes(),
        output_ids=b"",
        sampling=msgspec.msgpack.encode(sampling),
        max_new_tokens=STEPS,
        namespace="",
        logprobs=LogprobSpec(start=0, num_top=2, token_ids=(3, 4)) if number == 0 else None,
        routed_experts_start=None,
        requires_reasoning=False,
    )
    worker._model.add(worker._worker.add(request))


def test_tokens_are_those_of_a_cpu(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "moe_intermediate_size": 32}
    model_dir = run_in_fork(
        make_checkpoint, "qwen3_moe", tmp_path, dtype="float32", attention_gain=1.0, **sizes
    )
    cpu, device = (run_in_fork(sample, model_dir, on_device=its) for its in (False, True))
    assert device == cpu
    assert all(tokens[1] == 7 for tokens in device)
