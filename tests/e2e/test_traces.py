"""A trace of a real server, replayed, gives that server's counters."""

import random
from pathlib import Path

import httpx
import numpy as np
import pytest
from checkpoints import VOCAB_SIZE, make_checkpoint
from forking import run_in_fork
from serving import running_server

from eval.replay import replay_whole
from eval.trace import record
from sglmoe.prediction.trace import Kind, load_trace

pytestmark = pytest.mark.usefixtures("preloaded")


def record_mixed_requests(model_dir: Path, log: Path, output: Path, *flags: str) -> str:
    """24 requests, four at a time, half of them with a common prefix, under constant pressure."""
    rng = random.Random(1)
    prefix = [rng.randrange(5, VOCAB_SIZE) for _ in range(48)]
    prompts = [
        (prefix if i % 2 else [])
        + [rng.randrange(5, VOCAB_SIZE) for _ in range(rng.randint(3, 60))]
        for i in range(24)
    ]
    requests = [
        {"input_ids": ids, "sampling_params": {"max_new_tokens": 20, "temperature": 0}}
        for ids in prompts
    ]
    with running_server(
        "sglmoe.launch_server",
        f"--model-path={model_dir}",
        "--memory-budget=2500KB",
        *flags,
        log=log,
        environ={"SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(output.parent)},
    ) as server:
        # Right after another request, which has only just given its memory back.
        httpx.post(f"{server.url}/generate", json=requests[0], timeout=60).raise_for_status()
        return record(server.url, requests, output, concurrency=4)


@pytest.mark.parametrize(
    ("family", "prefetch"),
    [("qwen3_moe", "off"), ("deepseek_v2", "on")],  # which pauses while a trace is recorded
)
def test_replay_gives_the_servers_counters(family: str, prefetch: str, tmp_path: Path) -> None:
    model_dir = run_in_fork(make_checkpoint, family, tmp_path / "model")
    output = tmp_path / "trace.npz"
    flag = f"--expert-prefetch={prefetch}"
    run_in_fork(record_mixed_requests, model_dir, tmp_path / "log", output, flag)
    trace = load_trace(output)
    totals = trace.info.totals
    assert totals.experts_evicted > 0
    assert replay_whole(trace) == totals
    np.testing.assert_allclose(trace.probabilities.sum(axis=2, dtype=np.float32), 1, atol=0.01)
    assert trace.operations[-1][0] in (Kind.RELEASE, Kind.COMMIT, Kind.FORWARD)
    if family == "qwen3_moe":  # DeepSeek's router chooses among groups first
        chosen = np.take_along_axis(trace.probabilities, trace.expert_ids.astype(np.int64), axis=2)
        others = np.sort(trace.probabilities, axis=2)[:, :, : -trace.info.top_k]
        assert (chosen.min(axis=2) >= others.max(axis=2)).all()
