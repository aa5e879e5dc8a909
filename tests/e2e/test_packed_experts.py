"""Experts packed beside the checkpoint: the same answers, to the bit, with more of them in the same memory."""

from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from forking import run_in_fork
from sglmoe_engine import check_loads, running_sglmoe, state_of
from test_parity import Interview, check_same, interview

pytestmark = pytest.mark.usefixtures("preloaded")

EXPERT_BYTES = 3 * 64 * 128 * 2
NUM_EXPERTS = 3 * 16
NUM_BLOCKS = 12


def pack(model_dir: Path) -> None:
    from sglmoe.pack import main

    assert main(["--model-path", str(model_dir)]) == 0


def serve(
    model_dir: Path,
    *,
    num_frames: int = NUM_EXPERTS // 2,
    **options: str,
) -> Interview:
    """With frames for half of the experts and KV, and host memory for a quarter of the experts."""
    dense_bytes = (model_dir / "model.safetensors").stat().st_size - NUM_EXPERTS * EXPERT_BYTES
    with running_sglmoe(
        model_dir,
        dtype="bfloat16",
        memory_budget=str(dense_bytes + num_frames * EXPERT_BYTES),
        host_memory=str(NUM_BLOCKS * EXPERT_BYTES),
        **options,
    ) as engine:
        return Interview(*interview(engine), state=state_of(engine))


def test_packed_experts_change_no_bit_and_more_of_them_fit(tmp_path: Path) -> None:
    model_dir = run_in_fork(make_checkpoint, "qwen3_moe", tmp_path)
    plain = run_in_fork(serve, model_dir)
    run_in_fork(pack, model_dir)
    packed = run_in_fork(serve, model_dir, packed_experts="on")
    prefetched = run_in_fork(serve, model_dir, expert_prefetch="on")  # packed experts are found
    assert plain.state["memory"]["host_blocks"] == NUM_BLOCKS
    for its in (packed, prefetched):
        check_same(its, plain)
        memory = its.state["memory"]
        assert NUM_BLOCKS / 0.72 < memory["host_blocks"] + 1 <= NUM_BLOCKS / 0.69
        assert memory["host_hits"] > 0
        assert memory["disk_reads"] > 0


def test_they_stay_packed_in_the_arena_and_change_no_bit_there(tmp_path: Path) -> None:
    model_dir = run_in_fork(make_checkpoint, "qwen3_moe", tmp_path)
    plain = run_in_fork(serve, model_dir)
    run_in_fork(pack, model_dir)
    for num_frames, share in ((30, "50%"), (44, "30%")):
        its = run_in_fork(serve, model_dir, num_frames=num_frames, packed_share=share)
        check_same(its, plain)
        memory = its.state["memory"]
        parts = ("free_frames", "expert_frames", "packed_frames", "kv_frames")
        assert sum(memory[part] for part in parts) == memory["num_frames"]
        assert memory["packed_hits"] > memory["packed_kept"] > 0
        loads = memory["packed_hits"] + memory["host_hits"] + memory["disk_reads"]
        check_loads(memory, loads, expert_bytes=EXPERT_BYTES)
        assert its.state["packed"]["reason"] == f"{share} was asked for"
