"""A checkpoint in block fp8 is served, in any budget, with the bits of its twin: the same weights written out in bfloat16.

The twin is served by unmodified SGLang, which on our CPU platform serves the fp8 one likewise. On a CPU only: there weights are
dequantised, and activations stay as they are; a GPU rounds these to fp8 too (`tests/kernels/test_layer.py`).
"""

from pathlib import Path
from typing import Any

import pytest
from checkpoints import Fp8Checkpoints, make_checkpoint, make_fp8_checkpoints
from forking import run_in_fork
from sglmoe_engine import frames_budget
from test_flags import refusal
from test_parity import Interview, check_same, interview_sglang, interview_sglmoe, pages_per_frame
from test_plan import as_loaded, as_planned

from sglmoe.checkpoint import read_json
from sglmoe.plan.model_shape import read_model, shape_of

pytestmark = pytest.mark.usefixtures("preloaded")

BLOCK = 64  # gates and ups of 64 rows: a block each


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Fp8Checkpoints:
    """Scales in bfloat16, as Qwen's checkpoints have them, or in float32, as DeepSeek's have."""
    return run_in_fork(
        make_fp8_checkpoints,
        tmp_path_factory.mktemp("fp8"),
        block=BLOCK,
        scale_dtype=request.param,
    )


def budgets(roomy: Interview) -> dict[str, int]:
    """Frames for half of the experts, a quarter, and those of one token, beside the KV of the longest prompt."""
    memory, limits = roomy.state["memory"], roomy.state["limits"]
    num_experts = limits["expert_bytes"] // memory["frame_bytes"] + 1
    kv_frames = -(-340 // (memory["page_tokens"] * pages_per_frame(memory, roomy)))
    return {
        "half": num_experts // 2 + kv_frames,
        "quarter": num_experts // 4 + kv_frames,
        "waves": limits["floor_frames"] + kv_frames,
    }


def check_budgets(model_dir: Path, dtype: str, roomy: Interview, theirs: Interview) -> None:
    """With fewer frames than where all experts fit, which is `roomy`, answers are `theirs`."""
    assert roomy.state["memory"]["experts_evicted"] == 0
    for name, num_frames in budgets(roomy).items():
        budget = frames_budget(roomy.state, num_frames)
        tight = run_in_fork(interview_sglmoe, model_dir, dtype, budget)
        check_same(tight, theirs)
        memory = tight.state["memory"]
        assert memory["num_frames"] == num_frames
        assert memory["experts_evicted"] > 0
        assert (memory["num_split_layers"] > 0) >= (name == "waves")


@pytest.fixture(scope="module")
def theirs(models: Fp8Checkpoints) -> Interview:
    """What the twin answers."""
    return run_in_fork(interview_sglang, models.twin, "bfloat16")


@pytest.fixture(scope="module")
def roomy(models: Fp8Checkpoints) -> Interview:
    """What we answer where all experts fit."""
    return run_in_fork(interview_sglmoe, models.fp8, "auto", "200MB")


def test_every_budget_gives_the_answers_of_the_twin(
    models: Fp8Checkpoints, theirs: Interview, roomy: Interview
) -> None:
    check_same(roomy, theirs)
    # Half of what the twin's experts take, and 24 bytes of scales each: two for gates, two for ups, two for downs.
    assert roomy.state["limits"]["expert_bytes"] == 3 * 16 * (3 * 64 * 128 + 24)
    check_budgets(models.fp8, "auto", roomy, theirs)


def test_the_unmodified_server_answers_as_its_twin_does(
    models: Fp8Checkpoints, theirs: Interview
) -> None:
    """On our CPU platform: its own quantised layers with our equivalents of their kernels."""
    assert run_in_fork(interview_sglang, models.fp8, "bfloat16") == theirs


def differences() -> list[str]:
    import torch
    from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

    from sglmoe.kernels.block_fp8 import dequantise

    random, found = torch.Generator().manual_seed(1), []
    for height, width in ((256, 384), (130, 257)):
        weight = torch.randn(height, width, generator=random).mul_(100).to(torch.float8_e4m3fn)
        scale = torch.rand(-(-height // 128), -(-width // 128), generator=random)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            ours = dequantise(weight, scale, rows=128, columns=128, dtype=dtype)
            if not torch.equal(ours, block_quant_dequant(weight, scale, [128, 128], dtype)):
                found.append(f"{height} x {width} to {dtype}")
    return found


def test_weights_stand_for_what_sglang_takes_them_for() -> None:
    assert run_in_fork(differences) == []


def test_host_memory_and_prefetching_change_no_bit(
    models: Fp8Checkpoints, theirs: Interview, roomy: Interview
) -> None:
    budget = frames_budget(roomy.state, budgets(roomy)["quarter"])
    check_same(run_in_fork(interview_below, models.fp8, budget), theirs)


def interview_below(model_dir: Path, budget: str) -> Interview:
    from sglmoe_engine import running_sglmoe, state_of
    from test_parity import interview

    tiers: dict[str, Any] = {"host_memory": "500KB", "expert_prefetch": "on"}
    with running_sglmoe(model_dir, memory_budget=budget, **tiers) as engine:
        answers = Interview(*interview(engine), state=state_of(engine))
    assert answers.state["memory"]["host_hits"] > 0
    return answers


def test_the_plan_has_the_servers_bytes(models: Fp8Checkpoints) -> None:
    loaded = run_in_fork(as_loaded, models.fp8)
    assert as_planned(read_model(str(models.fp8), device="cpu").shape) == loaded
    config = read_json(models.fp8 / "config.json")
    assert as_planned(shape_of(config, dense=None, dtype="auto", device="cpu")) == loaded


def test_what_fp8_can_not_be_served_in_is_refused(models: Fp8Checkpoints, tmp_path: Path) -> None:
    words = refusal("--model-path", str(models.fp8), "--dtype", "float32")
    assert "--dtype=float32: weights in fp8 are multiplied in bfloat16 or float16" in words
    other = run_in_fork(make_checkpoint, "qwen3_moe", tmp_path)
    text = (other / "config.json").read_text()
    said = '"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}, "vocab'
    (other / "config.json").write_text(text.replace('"vocab', said, 1))
    assert "(fp8, weight_block_size none)" in refusal("--model-path", str(other))


def test_packing_refuses_fp8_by_name(models: Fp8Checkpoints, capsys: Any) -> None:
    from sglmoe.pack import main

    assert main(["--model-path", str(models.fp8)]) == 1
    assert "has experts in F8_E4M3; only BF16 is packed" in capsys.readouterr().err
