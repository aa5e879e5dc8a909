"""Experts in other formats on the pretended device, with too few frames for them: a CPU's tokens, or the bits of plain ones."""

from pathlib import Path

import pytest
from checkpoints import make_checkpoint, make_gptq_checkpoints
from decoding import Decoded, decode, measure
from forking import run_in_fork

pytestmark = pytest.mark.usefixtures("preloaded")


def decode_tightly(model_dir: Path, num_frames: int, **options: object) -> Decoded:
    budget = run_in_fork(measure, model_dir, "bfloat16")
    tight = run_in_fork(
        decode,
        model_dir,
        dtype="bfloat16",
        budget=budget.bytes(num_frames, captures=False),
        host_memory=str(8 * budget.frame_bytes),
        **options,
    )
    assert tight.violations == []
    assert tight.memory.experts_evicted > 0
    return tight


def test_gptq(tmp_path: Path) -> None:
    """Experts alone are in 4 bits: SGLang's kernels of dense layers in 4 bits are a GPU's."""
    only_experts = {"left_out": r".*\.self_attn\."}
    models = run_in_fork(
        make_gptq_checkpoints, "qwen3_moe", tmp_path, group=32, has_zeros=False, **only_experts
    )
    cpu = run_in_fork(decode, models.gptq, on_device=False, dtype="bfloat16")
    assert decode_tightly(models.gptq, num_frames=26).tokens == cpu.tokens


def pack(model_dir: Path) -> None:
    from sglmoe.pack import main

    assert main(["--model-path", str(model_dir)]) == 0


def test_packed_experts_are_decoded_on_the_device(tmp_path: Path) -> None:
    """As they come from host memory and from disk; and from frames of the arena, where some stay packed."""
    sizes = {"num_hidden_layers": 2, "num_experts_per_tok": 2}
    model_dir = run_in_fork(make_checkpoint, "qwen3_moe", tmp_path, **sizes)
    plain = run_in_fork(decode, model_dir, dtype="bfloat16")
    run_in_fork(pack, model_dir)
    packed = decode_tightly(model_dir, num_frames=12, packed_share="40%", num_packed=4)
    assert packed.rows == plain.rows  # tokens, log probabilities, routing
    assert packed.memory.packed_kept > 0
    assert packed.memory.packed_hits > 0
    assert packed.memory.disk_reads > 0
