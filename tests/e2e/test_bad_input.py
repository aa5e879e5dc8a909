"""Bad input gets a clear answer that names numbers and what to change, and touches nobody else."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from checkpoints import make_checkpoint
from forking import run_in_fork
from serving import Outcome, run_as_a_user, run_to_end, running_server

pytestmark = pytest.mark.usefixtures("preloaded")

MODULE = "sglmoe.launch_server"


def generate(url: str, **request: Any) -> requests.Response:
    return requests.post(f"{url}/generate", json=request, timeout=120)


BAD_REQUESTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # what: (request, what the answer must name)
    "a prompt longer than the context": ({"input_ids": [5] * 9000}, ("9000", "4096")),
    "more new tokens than can ever fit": (
        {"input_ids": [5] * 10, "sampling_params": {"max_new_tokens": 100_000}},
        ("100000",),
    ),
    "a token outside the vocabulary": ({"input_ids": [5, 1024]}, ("1024",)),
    "a negative token": ({"input_ids": [5, -3]}, ("-3",)),
    "an invalid regex": (
        {"input_ids": [5], "sampling_params": {"regex": "(unclosed"}},
        ("regex",),
    ),
    "an invalid JSON schema": (
        {"input_ids": [5], "sampling_params": {"json_schema": '{"type": 7}'}},
        ("json",),
    ),
    "two constraints": (
        {"input_ids": [5], "sampling_params": {"regex": "a", "ebnf": 'root ::= "a"'}},
        ("Only one",),
    ),
    "a negative temperature": (
        {"input_ids": [5], "sampling_params": {"temperature": -1}},
        ("temperature",),
    ),
    "top_p of 0": ({"input_ids": [5], "sampling_params": {"top_p": 0}}, ("top_p",)),
    "an unknown sampling parameter": (
        {"input_ids": [5], "sampling_params": {"temprature": 0}},
        ("temprature",),
    ),
    "a logprob position behind the prompt": (
        {"input_ids": [5, 6], "return_logprob": True, "logprob_start_len": 7},
        ("7",),
    ),
    "hidden states": ({"input_ids": [5], "return_hidden_states": True}, ("hidden",)),
    "an adapter": ({"input_ids": [5], "lora_path": "mine"}, ("lora",)),
}


def ask_badly(model_dir: Path, log: Path) -> dict[str, tuple[int, str]]:
    """The answers to all bad requests, while a good one is streamed and must come out untouched."""
    good = {"input_ids": [5, 6, 7], "sampling_params": {"temperature": 0, "max_new_tokens": 200}}
    with running_server(
        MODULE, f"--model-path={model_dir}", "--memory-budget=8MB", log=log
    ) as server:
        alone = generate(server.url, **good).json()["output_ids"]
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(generate, server.url, **good)
            answers = {
                name: (response.status_code, response.text)
                for name, (request, _) in BAD_REQUESTS.items()
                for response in [generate(server.url, **request)]
            }
            nan = '{"input_ids": [5], "sampling_params": {"temperature": NaN}}'
            response = requests.post(
                f"{server.url}/generate",
                data=nan,
                headers={"Content-Type": "application/json"},
                timeout=60,
            )
            answers["NaN temperature"] = (response.status_code, response.text)
            assert beside.result().json()["output_ids"] == alone
        assert generate(server.url, **good).json()["output_ids"] == alone
    return answers


def test_bad_requests_are_refused_and_others_go_on(tmp_path: Path) -> None:
    model_dir = run_in_fork(make_checkpoint, "qwen3_moe", tmp_path / "model")
    answers = run_in_fork(ask_badly, model_dir, tmp_path / "log")
    accepted = {name: text for name, (status, text) in answers.items() if not 400 <= status < 500}
    assert accepted == {}
    silent = {
        name: answers[name][1]
        for name, (_, words) in BAD_REQUESTS.items()
        if not all(word.lower() in answers[name][1].lower() for word in words)
    }
    assert silent == {}


def ask_for_too_much(model_dir: Path, log: Path) -> tuple[int, str, int]:
    with running_server(
        MODULE, f"--model-path={model_dir}", "--memory-budget=3MB", log=log
    ) as server:
        params = {"max_new_tokens": 3000, "temperature": 0}
        refusal = generate(server.url, input_ids=[5] * 10, sampling_params=params)
        beside = generate(server.url, input_ids=[5] * 10, sampling_params={"max_new_tokens": 4})
        return refusal.status_code, refusal.text, beside.status_code


def test_what_can_never_fit_in_memory_is_refused_with_the_numbers(tmp_path: Path) -> None:
    # The context has 4096 tokens, 3 MB hold KV of fewer than 3010.
    model_dir = run_in_fork(make_checkpoint, "qwen3_moe", tmp_path / "model")
    status, text, beside = run_in_fork(ask_for_too_much, model_dir, tmp_path / "log")
    assert (status, beside) == (400, 200)
    assert all(word in text for word in ("10 tokens", "3000", "--memory-budget"))


def start_with(log: Path, *flags: str) -> Outcome:
    return run_to_end(MODULE, *flags, log=log)


def truncate_weights(model_dir: Path) -> None:
    (weights,) = model_dir.glob("*.safetensors")
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param(["--memory-budget=lots"], ["--memory-budget", "lots"], id="no size"),
        pytest.param(["--tp-size=2"], ["--tp"], id="tensor parallel"),
        pytest.param(["--speculative-algorithm=EAGLE"], ["--speculative"], id="speculative"),
        pytest.param(["--no-such-flag"], ["--no-such-flag"], id="unknown flag"),
    ],
)
def test_bad_flags_refuse_to_start(flags: list[str], words: list[str], tmp_path: Path) -> None:
    model_dir = run_in_fork(make_checkpoint, "qwen3_moe", tmp_path / "model")
    outcome = run_in_fork(start_with, tmp_path / "log", f"--model-path={model_dir}", *flags)
    assert outcome.exitcode not in (0, None)
    last = outcome.log.strip().splitlines()[-8:]
    assert all(word in "\n".join(last) for word in words), last


def test_a_budget_below_the_dense_weights_refuses_to_start(tmp_path: Path) -> None:
    """As a user does it, with no fork of ours: the worker's reason reaches the terminal."""
    model_dir = run_in_fork(make_checkpoint, "qwen3_moe", tmp_path / "model")
    command = [sys.executable, "-m", MODULE, f"--model-path={model_dir}", "--memory-budget=200KB"]
    outcome = run_as_a_user(*command, log=tmp_path / "log")
    assert outcome.exitcode == 1
    assert "the dense weights alone take" in outcome.log
    assert "of the 195.31 KiB budget; raise --memory-budget" in outcome.log


def test_a_missing_checkpoint_refuses_to_start(tmp_path: Path) -> None:
    outcome = run_in_fork(start_with, tmp_path / "log", f"--model-path={tmp_path}/nothing-here")
    assert outcome.exitcode not in (0, None)
    assert "nothing-here" in outcome.log.splitlines()[-1]


def test_a_truncated_checkpoint_refuses_to_start(tmp_path: Path) -> None:
    model_dir = run_in_fork(make_checkpoint, "qwen3_moe", tmp_path / "model")
    truncate_weights(model_dir)
    outcome = run_in_fork(start_with, tmp_path / "log", f"--model-path={model_dir}")
    assert outcome.exitcode not in (0, None)
    assert "model.safetensors" in "\n".join(outcome.log.splitlines()[-3:])


def load_as_another_class(model_dir: Path) -> str:
    """What a worker says of a Mixtral that SGLang builds, as it does for some quantisations, with expert modules of its own."""
    from loaded_worker import LoadedWorker

    def choose_another() -> None:
        from sglang.srt.models.mixtral_quant import QuantMixtralForCausalLM
        from sglang.srt.models.registry import ModelRegistry

        ModelRegistry.models["MixtralForCausalLM"] = QuantMixtralForCausalLM

    try:
        LoadedWorker(model_dir, before_loading=choose_another)
    except ValueError as error:
        return str(error)
    return ""


def test_experts_that_would_count_as_dense_weights_refuse_to_start(tmp_path: Path) -> None:
    model_dir = run_in_fork(make_checkpoint, "mixtral", tmp_path)
    words = run_in_fork(load_as_another_class, model_dir)
    assert "MixtralForCausalLM has experts in 3 layers" in words
    assert "as QuantMixtralForCausalLM, in which those of 3 can't be paged" in words
