"""A checkpoint in GPTQ is served, in any budget, with the bits of its twin: the same weights written out in bfloat16.

The twin is served by unmodified SGLang, which on our CPU platform serves the other one likewise, with its own loader of weights
in 4 bits. On a CPU only, where weights are dequantised; a GPU's kernel is in `tests/kernels`. AWQ is refused on a CPU.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import GptqCheckpoints, make_checkpoint, make_gptq_checkpoints
from forking import run_in_fork
from sglmoe_engine import frames_budget
from test_flags import refusal
from test_fp8 import budgets, check_budgets, interview_below
from test_parity import Interview, check_same, interview, interview_sglang, interview_sglmoe
from test_plan import as_loaded, as_planned

from sglmoe.checkpoint import read_json
from sglmoe.plan.model_shape import read_model, shape_of

pytestmark = pytest.mark.usefixtures("preloaded")

GROUP = 32
# An expert's three matrices of 64 x 128: half a byte each, and scales of 2 bytes and zero points of half a byte for each group.
EXPERT_BYTES = 3 * 64 * 128 // 2 + 3 * 256 * 2
KINDS: dict[str, dict[str, Any]] = {
    "all": {"has_zeros": False},
    # As GPTQModel says what is not quantised: dense layers stay in bfloat16.
    "experts-with-zeros": {"has_zeros": True, "left_out": r".*\.self_attn\."},
}


@pytest.fixture(scope="module", params=KINDS)
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> GptqCheckpoints:
    folder = tmp_path_factory.mktemp("gptq")
    kind = KINDS[request.param]
    return run_in_fork(make_gptq_checkpoints, "qwen3_moe", folder, group=GROUP, **kind)


@pytest.fixture(scope="module")
def theirs(models: GptqCheckpoints) -> Interview:
    """What the twin answers."""
    return run_in_fork(interview_sglang, models.twin, "bfloat16")


@pytest.fixture(scope="module")
def roomy(models: GptqCheckpoints) -> Interview:
    """What we answer where all experts fit."""
    return run_in_fork(interview_sglmoe, models.gptq, "bfloat16", "200MB")


def test_every_budget_gives_the_answers_of_the_twin(
    models: GptqCheckpoints, theirs: Interview, roomy: Interview
) -> None:
    check_same(roomy, theirs)
    has_zeros = not read_json(models.gptq / "config.json")["quantization_config"]["sym"]
    expert_bytes = EXPERT_BYTES + has_zeros * 3 * 256 // 2
    assert roomy.state["limits"]["expert_bytes"] == 3 * 16 * expert_bytes
    check_budgets(models.gptq, "bfloat16", roomy, theirs)


def interview_wna16(model_dir: Path) -> Interview:
    """What a user of unmodified SGLang types for the kernel that reads our frames."""
    from sglang_engine import running_engine

    with running_engine(model_dir, dtype="bfloat16", quantization="moe_wna16") as engine:
        return Interview(*interview(engine), state={})


def test_the_unmodified_server_answers_as_its_twin_does(
    models: GptqCheckpoints, theirs: Interview
) -> None:
    """On our CPU platform: its own loader and experts, with our equivalents of its kernels."""
    assert run_in_fork(interview_wna16, models.gptq) == theirs


def test_another_family_answers_as_its_twin(tmp_path: Path) -> None:
    """With shared experts in 4 bits too, and a gate of theirs that is not."""
    gptq, twin = run_in_fork(
        make_gptq_checkpoints, "qwen2_moe", tmp_path, group=GROUP, has_zeros=False
    )
    theirs = run_in_fork(interview_sglang, twin, "bfloat16")
    roomy = run_in_fork(interview_sglmoe, gptq, "bfloat16", "200MB")
    check_same(roomy, theirs)
    budget = frames_budget(roomy.state, budgets(roomy)["waves"])
    check_same(run_in_fork(interview_sglmoe, gptq, "bfloat16", budget), theirs)
    assert as_planned(read_model(str(gptq), device="cpu").shape) == run_in_fork(as_loaded, gptq)


def test_host_memory_and_prefetching_change_no_bit(
    models: GptqCheckpoints, theirs: Interview, roomy: Interview
) -> None:
    budget = frames_budget(roomy.state, budgets(roomy)["quarter"])
    check_same(run_in_fork(interview_below, models.gptq, budget), theirs)


def test_the_plan_has_the_servers_bytes(models: GptqCheckpoints) -> None:
    loaded = run_in_fork(as_loaded, models.gptq)
    assert as_planned(read_model(str(models.gptq), device="cpu").shape) == loaded
    config = read_json(models.gptq / "config.json")
    assert as_planned(shape_of(config, dense=None, dtype="auto", device="cpu")) == loaded


def held_experts(model_dir: Path) -> tuple[int, int]:
    """Bytes of experts that lie in the process's own memory beside the arena, and of all."""
    from loaded_worker import LoadedWorker

    store = LoadedWorker(model_dir).loaded.experts.store
    return store.unmap(), store.total_bytes


def test_experts_stay_in_the_checkpoint_until_they_are_used(models: GptqCheckpoints) -> None:
    """They are converted as they are read: no copy of the checkpoint lies beside the budget."""
    held_bytes, total_bytes = run_in_fork(held_experts, models.gptq)
    assert (held_bytes, total_bytes > 3 * 16 * 3 * 64 * 64) == (0, True)


def test_what_can_not_be_served_is_refused_before_sglang_is_asked(
    models: GptqCheckpoints, tmp_path: Path
) -> None:
    words = refusal("--model-path", str(models.gptq), "--dtype", "float32")
    assert "--dtype=float32: weights in 4 bits are multiplied in bfloat16 or float16" in words
    words = refusal("--model-path", str(models.gptq), "--quantization", "gptq_marlin")
    assert "--quantization=gptq_marlin: weights are served as the checkpoint has them" in words
    plain = run_in_fork(make_checkpoint, "qwen3_moe", tmp_path)
    words = refusal("--model-path", str(plain), "--quantization", "moe_wna16")
    assert "--quantization=moe_wna16 is for checkpoints whose config.json says" in words
    config = json.loads((plain / "config.json").read_text())
    gptq = read_json(models.gptq / "config.json")["quantization_config"]
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    for said, words in (
        (gptq | {"desc_act": True}, "the checkpoint is in gptq with desc_act=true"),
        (awq, "the checkpoint is in AWQ, which SGLang 0.5.23 serves on GPUs alone"),
    ):
        (plain / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
        assert words in refusal("--model-path", str(plain))


def test_packing_refuses_it_by_name(models: GptqCheckpoints, capsys: Any) -> None:
    from sglmoe.pack import main

    assert main(["--model-path", str(models.gptq)]) == 1
    assert "only BF16 is packed" in capsys.readouterr().err
