"""`eval.serving` comes back to prefixes that it has asked for, and sees memory meanwhile."""

import json
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from forking import run_in_fork

from eval import serving
from eval.workloads import LONG, LONG_AGAIN, SHORT

pytestmark = pytest.mark.usefixtures("preloaded")

SIZES = {
    "prefixes": 2,
    "prefix-tokens": 256,
    "questions-per-prefix": 2,
    "long-output-len": 4,
    "short-prompts": 4,
    "output-len": 8,
    "concurrency": 2,
    "rounds": 1,
    "warmup": 0,
}


def test_a_shifting_workload_with_memory_to_spare(tmp_path: Path) -> None:
    model_dir = run_in_fork(make_checkpoint, "qwen3_moe", tmp_path / "model")
    arguments = [f"--{name}={value}" for name, value in SIZES.items()]
    arguments += [f"--model-path={model_dir}", f"--output={tmp_path}", "--workload=shifting"]
    run_in_fork(serving.main, [*arguments, "--budgets=64MiB", "--policies=static=50%"])
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()[1:]]
    assert [row["phase"] for row in rows] == [LONG, SHORT, LONG_AGAIN]
    assert [row["completed"] for row in rows] == [4, 4, 4]
    # All four find the 256 tokens of their prefix, which the middle has not driven out.
    assert rows[2]["cache_hit_tokens"] >= 4 * 256
    assert rows[2]["cache_hit_tokens"] > rows[0]["cache_hit_tokens"]
    assert [row["decoded_tokens"] for row in rows] == [4 * 3, 4 * 7, 4 * 3]
    seconds = [second for row in rows for second in row["timeline"]["seconds"]]
    assert seconds == sorted(seconds)
    assert "static=50%" in (tmp_path / "report.md").read_text()
