"""Prefetching changes when experts arrive, and no answer: whoever predicts, however late or wrong.

Half of the experts fit, and the disk is so slow that a layer waits longer than it computes. So what
is begun is late, given up, or pushes out what was needed; counters say whether that has happened.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import requests
from checkpoints import make_checkpoint
from forking import run_in_fork
from serving import running_server
from sglmoe_engine import running_sglmoe, state_of
from test_parity import NUM_TOKENS, TOGETHER, Interview, interview

from sglmoe.predictor.process import PROCESS_TITLE

pytestmark = pytest.mark.usefixtures("preloaded")

NUM_EXPERTS = 48  # in all layers
EXPERT_BYTES = 3 * 64 * 128 * 4
NUM_FRAMES = 32  # for half of the experts, and the KV of 16 requests
READ_RATE = "40MB"  # a second: an expert takes 2.5 ms
ATTEMPTS = 2  # at the interview: the second one meets what the first one has taught


class Asked(NamedTuple):
    """A model that runs short of memory, and what it answers without prefetching."""

    model_dir: Path
    budget: int
    answers: Interview


def ask_sglmoe(
    model_dir: Path, budget: int, *, believes: bool = False, **options: Any
) -> list[Interview]:
    """Interviews on the slow disk; a worker that `believes` acts on all that is predicted."""
    os.environ["SGLMOE_READ_RATE"] = READ_RATE
    if believes:
        make_workers_believe()
    with running_sglmoe(model_dir, dtype="float32", memory_budget=str(budget), **options) as engine:
        return list(interviews(engine))


def interviews(engine: Any) -> Iterator[Interview]:
    for _ in range(ATTEMPTS):
        yield Interview(*interview(engine), state=state_of(engine))
        engine.flush_cache()


def make_workers_believe() -> None:
    """In this process, which is a fork of the session's."""
    from sglmoe import engine
    from sglmoe.start_up import ChildEntry

    worker = ChildEntry("believing_worker", "run_believing_worker")
    engine.scheduler_entry = lambda config: ChildEntry(
        "sglmoe.scheduler.process", "run_scheduler", config=config, run_worker=worker
    )


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, preloaded: None) -> Asked:
    directory = tmp_path_factory.mktemp("prefetch")
    model_dir = run_in_fork(
        make_checkpoint, "qwen3_moe", directory, dtype="float32", attention_gain=1.0
    )
    file_bytes = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    budget = file_bytes - (NUM_EXPERTS - NUM_FRAMES) * EXPERT_BYTES
    answers = run_in_fork(ask_sglmoe, model_dir, budget)[0]
    return Asked(model_dir, budget, answers)


def check_same(ours: Interview, theirs: Interview) -> None:
    """Alone: the same bits. Together: the same tokens, and logprobs that only batch sizes tell apart."""
    assert ours.solo == theirs.solo
    assert ours.after_prefix_hit == theirs.after_prefix_hit
    for output, expected in zip(ours.together, theirs.together, strict=True):
        assert output.tokens == expected.tokens
        assert output.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_no_prediction_changes_an_answer(asked: Asked) -> None:
    attempts = run_in_fork(
        ask_sglmoe, asked.model_dir, asked.budget, believes=True, expert_prefetch="on"
    )
    for ours in attempts:
        check_same(ours, asked.answers)
    memory, prefetch = (attempts[-1].state[name] for name in ("memory", "prefetch"))
    assert memory["num_frames"] < NUM_EXPERTS
    for kind in ("begun", "used", "late", "wasted"):
        assert memory[f"prefetches_{kind}"] > 24, kind
    assert memory["late_seconds"] > 0
    assert set(prefetch["coverage"]) > {"last_step", "expert_map", "pregate", "random", "contrary"}
    assert not prefetch["failed"]


def test_observing_moves_nothing(asked: Asked) -> None:
    attempts = run_in_fork(ask_sglmoe, asked.model_dir, asked.budget, expert_prefetch="observe")
    for ours in attempts:
        check_same(ours, asked.answers)
    # Passes over many tokens bring whole layers, for which nothing is predicted.
    memory = attempts[-1].state["memory"]
    assert memory["prefetches_begun"] == memory["experts_streamed"] > 0
    prefetch = attempts[-1].state["prefetch"]
    assert prefetch["mode"] == "observe"
    assert prefetch["predictor"] in prefetch["coverage"]
    assert not prefetch["failed"]


class Served(NamedTuple):
    """What the product as it is has answered to prompts one after the other, and said of itself."""

    answers: list[list[int]]
    state: dict[str, Any]  # of /server_info
    metrics: str
    after_kill: list[list[int]]
    state_after_kill: dict[str, Any]


def serve(model_dir: Path, budget: int, log: Path) -> Served:
    flags = [
        f"--model-path={model_dir}",
        f"--memory-budget={budget}",
        "--dtype=float32",
        "--expert-prefetch=on",
        "--expert-predictor=last_step",
        "--enable-metrics",
    ]
    with running_server(
        "sglmoe.launch_server", *flags, log=log, environ={"SGLMOE_READ_RATE": READ_RATE}
    ) as server:
        answers = ask(server.url)
        state = server_state(server.url)
        metrics = requests.get(f"{server.url}/metrics", timeout=60).text
        fork_server = psutil.Process(state["worker_pid"]).parent()
        [predictor] = (its for its in fork_server.children() if its.name() == PROCESS_TITLE)
        predictor.kill()
        after_kill = ask(server.url)
        return Served(answers, state, metrics, after_kill, server_state(server.url))


def ask(url: str) -> list[list[int]]:
    answers = []
    for prompt in TOGETHER:
        body = {
            "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True},
        }
        answer = requests.post(f"{url}/generate", json=body, timeout=120)
        answers.append(answer.json()["output_ids"][:NUM_TOKENS])
    return answers


def server_state(url: str) -> dict[str, Any]:
    info = requests.get(f"{url}/server_info", timeout=60).json()
    return dict(info["internal_states"][0]["sglmoe"])


def test_a_server_says_what_comes_of_prefetching(asked: Asked, tmp_path: Path) -> None:
    served = run_in_fork(serve, asked.model_dir, asked.budget, tmp_path / "log")
    expected = [output.tokens for output in asked.answers.together]
    assert served.answers == expected
    state, metrics = served.state, served.metrics
    assert state["prefetch"]["mode"] == "on"
    assert state["prefetch"]["predictor"] == "last_step"
    # 496 decode steps, and a report after 448: the first trial has ended, and half of it ran with prefetching.
    assert state["prefetch"]["verdict"] in ("pays", "does not pay")
    assert state["memory"]["prefetches_used"] > 0
    values = {
        line.split("{")[0]: float(line.split()[-1])
        for line in metrics.splitlines()
        if line.startswith("sglmoe_prefetch")
    }
    for kind in ("begun", "used", "late", "wasted"):
        assert values[f"sglmoe_prefetches_{kind}_total"] == state["memory"][f"prefetches_{kind}"]
    for gauge in ("on", "step_ratio", "saved_seconds", "horizon_layers"):
        assert f"sglmoe_prefetch_{gauge}" in values
    assert served.after_kill == expected, "a predictor that is killed costs no answer"
    assert not state["prefetch"]["failed"]
    assert served.state_after_kill["prefetch"]["failed"]
