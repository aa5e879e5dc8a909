"""Experts in other formats on the pretended device, with too few frames for them: a CPU's tokens, or the bits of plain ones."""

from pathlib import Path

import pytest
from checkpoints import make_checkpoint, make_gptq_checkpoints
from decoding import STEPS, Decoded, decode, measure
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


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory: pytest.TempPathFactory, preloaded: None) -> Path:
    sizes = {"num_hidden_layers": 2, "num_experts_per_tok": 2}
    folder = tmp_path_factory.mktemp("packed")
    model_dir = run_in_fork(make_checkpoint, "qwen3_moe", folder, **sizes)
    run_in_fork(pack, model_dir)
    return model_dir


@pytest.fixture(scope="module")
def plain(packed_dir: Path) -> Decoded:
    """All experts fit, and none is packed."""
    return run_in_fork(decode, packed_dir, dtype="bfloat16", packed_experts="off")


def test_packed_experts_are_decoded_on_the_device(packed_dir: Path, plain: Decoded) -> None:
    """As they come from host memory and from disk; and from frames of the arena, where some stay packed."""
    packed = decode_tightly(packed_dir, num_frames=12, packed_share="40%", num_packed=4)
    assert packed.rows == plain.rows  # tokens, log probabilities, routing
    assert packed.memory.packed_kept > 0
    assert packed.memory.packed_hits > 0
    assert packed.memory.disk_reads > 0


def test_a_step_that_is_one_graph_decodes_them_too(packed_dir: Path, plain: Decoded) -> None:
    """From host memory for all experts as they are stored, which would not hold all as they are: what a layer misses is decoded
    as it is paged in, what comes ahead of it behind its copy, before the letter that tells of it."""
    budget = run_in_fork(measure, packed_dir, "bfloat16")
    its = run_in_fork(
        decode,
        packed_dir,
        dtype="bfloat16",
        backend="full",
        budget=budget.bytes(19, captures=True),  # seven for decoding in eager steps
        host_memory=str(budget.frame_bytes * 3 // 4 * 32),
        expert_prefetch="on",
        foreseen=plain,
    )
    assert its.rows == plain.rows
    assert its.violations == []
    assert its.num_segments == its.memory.lent_steps == STEPS
    assert its.memory.expert_misses > 0
    assert its.memory.experts_evicted > 0
    assert its.memory.prefetches_used + its.memory.prefetches_late > 0
