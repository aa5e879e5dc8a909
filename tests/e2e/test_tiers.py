"""Experts in frames, in host memory and on disk at once: the answers stay those of unmodified SGLang."""

from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import requests
from checkpoints import make_checkpoint
from forking import run_in_fork
from serving import running_server
from sglmoe_engine import check_loads, running_sglmoe, state_of
from test_memory import SLACK_BYTES
from test_parity import Interview, check_same, interview, interview_sglang

pytestmark = pytest.mark.usefixtures("preloaded")

NUM_EXPERTS = 3 * 160
EXPERT_BYTES = 3 * 704 * 128 * 4
NUM_FRAMES = NUM_BLOCKS = 80
ATTEMPTS = 2  # at the interview: the second one meets whom the first one left


class Served(NamedTuple):
    """Two interviews, and the worker's own memory (resident, not shared) in bytes."""

    interviews: list[Interview]
    when_ready: int
    in_the_end: int


def make_large_checkpoint(directory: Path) -> Path:
    """3 layers of 160 experts of 1.03 MiB in float32: 495 MiB."""
    return make_checkpoint(
        "qwen3_moe",
        directory,
        dtype="float32",
        attention_gain=1.0,
        num_experts=160,
        moe_intermediate_size=704,
    )


def serve_from_disk(model_dir: Path, memory_budget: str, host_memory: str) -> Served:
    with running_sglmoe(
        model_dir, dtype="float32", memory_budget=memory_budget, host_memory=host_memory
    ) as engine:
        worker = psutil.Process(state_of(engine)["worker_pid"])
        when_ready = worker.memory_full_info().uss
        interviews = []
        for _ in range(ATTEMPTS):
            interviews.append(Interview(*interview(engine), state=state_of(engine)))
            engine.flush_cache()
        return Served(interviews, when_ready, worker.memory_full_info().uss)


def test_three_times_more_experts_than_frames_and_host_memory(tmp_path: Path) -> None:
    model_dir = run_in_fork(make_large_checkpoint, tmp_path)
    theirs = run_in_fork(interview_sglang, model_dir, "float32")
    file_bytes = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    dense_bytes = file_bytes - NUM_EXPERTS * EXPERT_BYTES
    # 1 MiB for what is not in the file, such as the table of rotary embeddings.
    budget = dense_bytes + NUM_FRAMES * EXPERT_BYTES + 2**20
    served = run_in_fork(
        serve_from_disk, model_dir, str(budget), str(NUM_BLOCKS * EXPERT_BYTES + 5)
    )
    for ours in served.interviews:
        check_same(ours, theirs)

    memory, limits = (served.interviews[-1].state[name] for name in ("memory", "limits"))
    assert limits["expert_bytes"] == NUM_EXPERTS * EXPERT_BYTES
    assert memory["num_frames"] <= NUM_FRAMES
    # All three tiers were used, and every load was answered by one of the lower two.
    assert memory["host_blocks"] == memory["host_blocks_filled"] == NUM_BLOCKS
    assert memory["host_promoted"] - memory["host_evicted"] == NUM_BLOCKS
    assert memory["host_promoted_bytes"] == memory["host_promoted"] * EXPERT_BYTES
    assert memory["expert_hits"] > 0
    assert memory["host_hits"] > 0
    assert memory["disk_reads"] > 0
    assert memory["disk_bytes"] == memory["disk_reads"] * EXPERT_BYTES
    loads = memory["host_hits"] + memory["disk_reads"]
    check_loads(memory, loads, expert_bytes=EXPERT_BYTES)
    # Never all of the experts, whoever reads them.
    allowed = limits["arena_bytes"] + NUM_BLOCKS * EXPERT_BYTES + SLACK_BYTES
    assert served.in_the_end - served.when_ready < allowed < limits["expert_bytes"]


def cut_short_and_restore(model_dir: Path, log: Path) -> None:
    file = model_dir / "model.safetensors"
    whole = file.read_bytes()
    expert_bytes = 3 * 64 * 128 * 4
    flags = [
        f"--model-path={model_dir}",
        "--dtype=float32",
        f"--memory-budget={len(whole) - 30 * expert_bytes}",
        f"--host-memory={4 * expert_bytes}",
        "--max-running-requests=16",
        "--enable-metrics",
    ]
    with running_server("sglmoe.launch_server", *flags, log=log) as server:
        healthy = ask(server.url, 5)
        assert healthy.status_code == 200
        with file.open("r+b") as open_file:
            open_file.truncate(len(whole) // 4)
        broken = ask(server.url, 300)  # other tokens: no cached prefix, other experts
        assert broken.status_code == 500
        for words in (str(file), "ends", "restore the file"):
            assert words in broken.text
        # The same file grows back: whoever has it open sees that.
        file.write_bytes(whole)
        assert ask(server.url, 300).status_code == 200
        assert ask(server.url, 5).json()["output_ids"] == healthy.json()["output_ids"]
        check_metrics(requests.get(f"{server.url}/metrics", timeout=60).text)


def ask(url: str, first: int) -> requests.Response:
    request: dict[str, Any] = {
        "input_ids": list(range(first, first + 200)),
        "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
    }
    return requests.post(f"{url}/generate", json=request, timeout=120)


def check_metrics(text: str) -> None:
    values = {
        line.split("{")[0]: float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("sglmoe_")
    }
    assert values["sglmoe_host_blocks"] == 4
    assert values["sglmoe_host_promoted_total"] >= values["sglmoe_host_blocks_filled"] > 0
    assert values["sglmoe_disk_reads_total"] > 0


def test_a_checkpoint_cut_short_fails_requests_by_name_until_it_is_restored(
    tmp_path: Path,
) -> None:
    model_dir = run_in_fork(
        make_checkpoint, "qwen3_moe", tmp_path / "model", dtype="float32", attention_gain=1.0
    )
    run_in_fork(cut_short_and_restore, model_dir, tmp_path / "log")
