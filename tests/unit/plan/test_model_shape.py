"""A model in bytes, from its config alone and from its checkpoint's headers."""

import json
import math
from pathlib import Path

import msgspec
import pytest
import torch

from sglmoe.demo_model import DEMO_MODEL
from sglmoe.memory.expert_layout import Plain
from sglmoe.plan.families import SCALE, dense_shapes, inner_size_of
from sglmoe.plan.measure import conversion_seconds, matrix_maker
from sglmoe.plan.model_shape import (
    context_tokens_of,
    read_model,
    resolve_dtype,
    shape_of,
    tensor_shapes,
)
from sglmoe.supported_models import moe_layers_of, num_experts_of

MODELS = Path(__file__).parents[3] / "launch" / "models"
# As their pages on Hugging Face give them.
PUBLISHED_PARAMETERS = {
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-30b-a3b-fp8": 30_532_122_624,  # scales are none
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v2-lite": 15_706_484_224,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "olmoe-1b-7b": 6_919_161_856,
}


def test_every_recipes_model_has_a_published_size() -> None:
    assert {path.stem for path in MODELS.glob("*.json")} == set(PUBLISHED_PARAMETERS)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_a_published_config_has_the_published_number_of_parameters(name: str) -> None:
    config = json.loads((MODELS / f"{name}.json").read_text())
    shapes = dense_shapes(config)
    dense = sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(SCALE))
    expert = 3 * config["hidden_size"] * inner_size_of(config)
    experts = len(moe_layers_of(config)) * num_experts_of(config) * expert
    assert dense + experts == PUBLISHED_PARAMETERS[name]


def test_a_config_alone_tells_the_tensors_that_the_headers_have() -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    model = read_model(str(DEMO_MODEL), device="cpu")
    assert dense_shapes(config) == tensor_shapes(model.shards)


def test_experts_are_as_large_as_the_device_pads_them() -> None:
    """The demo's inner size is 48: a CPU rounds up to 64."""
    on_cpu, on_gpu = (read_model(str(DEMO_MODEL), device=d).shape for d in ("cpu", "cuda"))
    assert on_cpu.expert_bytes == 3 * 128 * 64 * 2
    assert on_gpu.expert_bytes == 3 * 128 * 48 * 2


def test_mla_keeps_one_latent_row_a_layer() -> None:
    """576 numbers of 2 bytes in 27 layers; plain attention keeps K and V of every head."""
    lite = json.loads((MODELS / "deepseek-v2-lite.json").read_text())
    shape = shape_of(lite, dense=None, dtype="auto", device="cuda")
    assert (shape.token_rows, shape.token_bytes) == (27, 27 * 576 * 2)
    qwen = json.loads((MODELS / "qwen3-30b-a3b.json").read_text())
    shape = shape_of(qwen, dense=None, dtype="auto", device="cuda")
    assert (shape.token_rows, shape.token_bytes) == (2 * 48, 2 * 48 * 4 * 128 * 2)


def test_fp8_halves_experts_and_linear_weights_and_adds_scales() -> None:
    """Qwen3-30B-A3B-FP8, by its config: embeddings, head, routers and norms stay in bfloat16."""
    plain = json.loads((MODELS / "qwen3-30b-a3b.json").read_text())
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    said["modules_to_not_convert"] = ["lm_head", "model.layers.0.self_attn.o_proj"]
    config = plain | {"quantization_config": said}
    before, after = (
        shape_of(its, dense=None, dtype="auto", device="cuda") for its in (plain, config)
    )
    assert after.expert_bytes == before.expert_bytes // 2 + 1152
    # Of each layer q [4096, 2048], k and v [512, 2048], o [2048, 4096]; that of the first layer is left out.
    quantised = 48 * (4096 + 512 + 512 + 4096) * 2048 - 4096 * 2048
    assert after.dense_bytes == before.dense_bytes - quantised + 4 * quantised // 128**2
    assert after.token_bytes == before.token_bytes


@pytest.mark.parametrize(
    ("said", "context_tokens"),
    [
        ({}, 40_960),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 81_920),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 8}},
            40_960,
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, 40_960),
        ({"seq_length": 100, "model_max_length": 7}, 100),
        ({"max_position_embeddings": None}, 2048),
    ],
)
def test_the_longest_context_is_sglangs(said: dict[str, object], context_tokens: int) -> None:
    config = json.loads((MODELS / "qwen3-30b-a3b.json").read_text()) | said
    assert context_tokens_of(config) == context_tokens


def in_int4(method: str, **said: object) -> dict[str, object]:
    """Qwen3-30B-A3B's config, as of a checkpoint in 4 bits with groups of 128."""
    plain = json.loads((MODELS / "qwen3-30b-a3b.json").read_text())
    said |= {"quant_method": method, "bits": 4, "group_size": 128}
    said |= {"sym": True, "desc_act": False} if method == "gptq" else {"zero_point": True}
    return dict(plain | {"quantization_config": said})


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_int4_quarters_experts_and_linear_weights_and_adds_scales_and_zeros(method: str) -> None:
    """By its config: embeddings, head, routers and norms stay in bfloat16, and what it leaves out. Only AWQ has zero points."""
    plain = json.loads((MODELS / "qwen3-30b-a3b.json").read_text())
    rule = "layers.0.self_attn.o_proj"
    left_out = {"gptq": {"dynamic": {f"-:.*{rule}": {}}}, "awq": {"modules_to_not_convert": [rule]}}
    config = in_int4(method, **left_out[method])
    before, after = (
        shape_of(its, dense=None, dtype="auto", device="cuda") for its in (plain, config)
    )
    group_bytes = 2.5 if method == "awq" else 2
    assert after.expert_bytes == before.expert_bytes // 4 + 3 * 2048 * 768 / 128 * group_bytes
    # Of each layer q [4096, 2048], k and v [512, 2048], o [2048, 4096]; that of the first layer is left out.
    quantised = 48 * (4096 + 512 + 512 + 4096) * 2048 - 4096 * 2048
    saved = quantised * 1.5 - quantised / 128 * group_bytes
    assert after.dense_bytes == before.dense_bytes - saved
    assert after.token_bytes == before.token_bytes


def test_a_config_tells_the_tensors_of_a_checkpoint_in_int4() -> None:
    """Of a key projection `[512, 2048]`: words of eight inputs, or of eight rows."""
    key = "model.layers.3.self_attn.k_proj"
    gptq, awq = (dense_shapes(in_int4(method)) for method in ("gptq", "awq"))
    assert {name: its for name, its in gptq.items() if name.startswith(f"{key}.")} == {
        f"{key}.qweight": (256, 512),
        f"{key}.scales": (16, 512),
        f"{key}.qzeros": (16, 64),
        f"{key}.g_idx": (2048,),
    }
    assert {name: its for name, its in awq.items() if name.startswith(f"{key}.")} == {
        f"{key}.qweight": (2048, 64),
        f"{key}.scales": (16, 512),
        f"{key}.qzeros": (16, 64),
    }
    kept = (
        "model.embed_tokens",
        "lm_head",
        "model.layers.3.mlp.gate",
        "model.layers.3.self_attn.k_norm",
    )
    assert all(f"{name}.weight" in gptq for name in kept)


def test_awq_is_planned_for_a_gpu_and_refused_for_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(in_int4("awq")))
    assert read_model(str(tmp_path), device="cuda").shape.expert_bytes == 2_451_456
    with pytest.raises(ValueError, match="the checkpoint is in AWQ"):
        read_model(str(tmp_path), device="cpu")


def test_a_cpus_speed_is_measured_with_the_conversion_of_weights_in_int4() -> None:
    config = in_int4("gptq") | {"hidden_size": 256, "moe_intermediate_size": 128}
    shape = shape_of(config, dense=None, dtype="auto", device="cpu")
    weights = matrix_maker(200, 256, shape)
    assert (weights().shape, weights().dtype) == ((200, 256), torch.bfloat16)
    assert weights() is not weights()
    assert 0 < conversion_seconds(shape) < 0.1
    config["quantization_config"] = None
    plain = shape_of(config, dense=None, dtype="auto", device="cpu")
    assert conversion_seconds(plain) == 0


@pytest.mark.parametrize(
    ("own", "asked", "resolved"),
    [
        ("bfloat16", "auto", "bfloat16"),
        ("float32", "auto", "float16"),
        ("float32", "float32", "float32"),
        ("bfloat16", "half", "float16"),
    ],
)
def test_auto_means_what_it_means_to_sglang(own: str, asked: str, resolved: str) -> None:
    assert resolve_dtype({"torch_dtype": own}, asked) == resolved


def test_what_is_not_here_is_not_downloaded() -> None:
    with pytest.raises(ValueError, match=r"hf download nobody/has-this-model config\.json"):
        read_model("nobody/has-this-model", device="cpu")


def test_what_the_server_refuses_is_refused_here(tmp_path: Path) -> None:
    config = {"architectures": ["GptOssForCausalLM"], "num_local_experts": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the experts of GptOssForCausalLM can't be paged yet"):
        read_model(str(tmp_path), device="cpu")


def test_fp8_in_float32_is_refused_here_too(tmp_path: Path) -> None:
    config = json.loads((MODELS / "qwen3-30b-a3b.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--dtype=float32: weights in fp8"):
        read_model(str(tmp_path), dtype="float", device="cpu")
    assert read_model(str(tmp_path), device="cpu").shape.expert_bytes == 4_719_744


@pytest.mark.parametrize(("device", "item_bytes"), [("cpu", 2), ("cuda", 4)])
def test_a_server_counts_its_rotary_table_as_dense(device: str, item_bytes: int) -> None:
    """Of the demo model 4096 positions and 256 to spare, of 64 numbers; in float32 on a GPU."""
    model = read_model(str(DEMO_MODEL), device=device)
    weights = 2 * sum(math.prod(shape) for shape in tensor_shapes(model.shards).values())
    assert model.shape.dense_bytes == weights + 4352 * 64 * item_bytes


def test_the_demo_model_is_as_large_as_a_server_on_a_cpu_found_it() -> None:
    """`dense_bytes` in its /server_info; `tests/e2e/test_plan.py` asks one."""
    assert read_model(str(DEMO_MODEL), device="cpu").shape.dense_bytes == 2_839_296


def test_a_cpus_speed_is_measured_on_weights_as_it_has_them() -> None:
    """In fp8 it dequantises them each time: what is timed gives them in the type that is multiplied."""
    config = json.loads((MODELS / "qwen3-30b-a3b-fp8.json").read_text())
    shape = shape_of(config, dense=None, dtype="auto", device="cpu")
    weights = matrix_maker(200, 256, shape)
    assert weights().shape == (200, 256)
    assert weights().dtype == torch.bfloat16
    assert weights() is not weights()
    plain = matrix_maker(
        200, 256, msgspec.structs.replace(shape, format=Plain("float32"), item_bytes=4)
    )
    assert plain().dtype == torch.float32
    assert plain() is plain()
