"""Which checkpoints in GPTQ and AWQ are refused, and with which words."""

from typing import Any

import pytest

from sglmoe.int4_models import ARCHITECTURES, Int4, int4_of, is_left_out
from sglmoe.supported_models import ModelFacts, quantisation_of, refused_model

# As Qwen3-30B-A3B-GPTQ-Int4 has it, and an AWQ checkpoint of AutoAWQ's.
GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "lm_head": False,
    "true_sequential": True,
    "checkpoint_format": "gptq",
}
AWQ: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["mlp.gate"],
}


def refusal(said: dict[str, Any], **facts: Any) -> str:
    """Of Qwen3-30B-A3B that says this, on a GPU; empty if there is none."""
    known: dict[str, Any] = {"architecture": "Qwen3MoeForCausalLM", "num_experts": 128}
    known |= {"hidden_size": 2048, "expert_inner_size": 768, "moe_layers": tuple(range(48))}
    known |= {"quantization": quantisation_of({"quantization_config": said})}
    why = refused_model(ModelFacts(**known | facts))
    return str(why or "")


@pytest.mark.parametrize("said", [GPTQ, AWQ], ids=["gptq", "awq"])
@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_experts_in_4_bits_are_served(
    said: dict[str, Any], capability: tuple[int, int] | None, architecture: str
) -> None:
    """A plan does not know the GPU."""
    assert refusal(said, capability=capability, architecture=architecture) == ""
    assert refusal(said, dtype="float16", capability=capability) == ""


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"bits": 8}, "in gptq with bits=8"),
        ({"bits": 3}, "in gptq with bits=3"),
        ({"desc_act": True}, "in gptq with desc_act=true"),
        ({"desc_act": True, "static_groups": True}, "in gptq with desc_act=true"),
        ({"group_size": -1}, "in gptq with group_size=-1"),
        ({"group_size": None}, "in gptq with group_size=None"),
        ({"checkpoint_format": "gptq_v2"}, "in gptq with checkpoint_format=gptq_v2"),
        ({"checkpoint_format": "marlin"}, "in gptq with checkpoint_format=marlin"),
        ({"sym": None}, "in gptq with sym=None"),
        ({"sym": False}, "in gptq with sym=false"),
        ({"lm_head": True}, "in gptq with lm_head=true"),
        (
            {"modules_in_block_to_quantize": [["mlp.experts.0.up_proj"]]},
            "in gptq with modules_in_block_to_quantize",
        ),
        ({"dynamic": {"+:.*down_proj": {"bits": 8}}}, "with dynamic '+:.*down_proj'"),
        ({"dynamic": {".*down_proj": {"bits": 8}}}, "with dynamic '.*down_proj'"),
        ({"dynamic": {"-:*.down_proj": {}}}, "with dynamic '-:*.down_proj'"),
        ({"dynamic": {r"-:.*layers\.3\.mlp": {}}}, r"experts that are left out (.*layers\.3\.mlp)"),
        ({"dynamic": {"-:.*w2": {}, "-:.*127.up_proj": {}}}, "left out (.*127.up_proj)"),
    ],
)
def test_other_gptq_is_refused_by_name(said: dict[str, Any], words: str) -> None:
    assert words in refusal(GPTQ | said)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"zero_point": False}, "in awq with zero_point=false"),
        ({"version": "GEMV"}, "in awq with version=gemv"),
        ({"modules_to_not_convert": ["layers.47."]}, "experts that are left out (layers.47.)"),
    ],
)
def test_other_awq_is_refused_by_name(said: dict[str, Any], words: str) -> None:
    assert words in refusal(AWQ | said)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"architecture": "OlmoeForCausalLM"}, "OlmoeForCausalLM in gptq is not tested"),
        ({"architecture": "LlamaForCausalLM", "num_experts": 0}, "LlamaForCausalLM in gptq"),
        ({"expert_inner_size": 704}, "hidden size 2048 and inner size 704 in groups of 128"),
        ({"hidden_size": 2000}, "hidden size 2000 and inner size 768 in groups of 128"),
        ({"dtype": "float32"}, "--dtype=float32: weights in 4 bits"),
        ({"capability": (7, 5)}, "compute capability 7.5, and SGLang's kernels"),
    ],
)
def test_models_and_machines_that_can_not_have_it_are_told(
    facts: dict[str, Any], words: str
) -> None:
    assert words in refusal(GPTQ, **facts)


def test_a_cpu_has_gptq_of_either_kind_and_no_awq() -> None:
    assert refusal(GPTQ, on_cpu=True) == ""
    assert refusal(GPTQ | {"sym": False}, on_cpu=True) == ""
    assert "in AWQ, which SGLang 0.5.23 serves on GPUs alone" in refusal(AWQ, on_cpu=True)


def test_a_flag_makes_no_checkpoint_one_in_4_bits() -> None:
    """What SGLang's ModelConfig says of a plain checkpoint under that flag."""
    assert "--quantization=moe_wna16 is for checkpoints" in refusal({"quant_method": "moe_wna16"})


def test_modules_are_left_out_as_sglang_leaves_them_out() -> None:
    """GPTQ by a pattern at the beginning of the name, AWQ by a part of it."""
    gptq = int4_of(GPTQ | {"dynamic": {"-:.*self_attn": {}, "-:o_proj": {}}})
    assert gptq is not None
    assert is_left_out(gptq, "model.layers.0.self_attn.o_proj")
    assert not is_left_out(gptq, "model.layers.0.mlp.o_proj")
    awq = int4_of(AWQ)
    assert awq is not None
    assert is_left_out(awq, "model.layers.0.mlp.gate_up_proj")
    assert not is_left_out(awq, "model.layers.0.mlp.experts.0.gate_proj")


def test_a_config_is_read_as_far_as_it_decides() -> None:
    assert int4_of(GPTQ) == Int4(method="gptq", group=128)
    assert int4_of(GPTQ | {"sym": False}) == Int4(method="gptq", group=128, has_zeros=True)
    awq = Int4(method="awq", group=128, has_zeros=True, left_out=("mlp.gate",))
    assert int4_of(AWQ) == awq
    assert int4_of({"quant_method": "fp8"}) is None
