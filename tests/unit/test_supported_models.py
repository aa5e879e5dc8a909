"""Which models are refused, and with which words."""

import pytest

from sglmoe.supported_models import (
    PAGED_ARCHITECTURES,
    ModelFacts,
    Quantisation,
    num_experts_of,
    quantisation_of,
    refused_layers,
    refused_model,
)

BLOCKS = Quantisation("fp8", (128, 128))


@pytest.mark.parametrize("architecture", PAGED_ARCHITECTURES)
def test_paged_families_are_served(architecture: str) -> None:
    assert refused_model(ModelFacts(architecture=architecture, num_experts=8)) is None


def test_any_dense_text_model_is_served_tied_or_not() -> None:
    assert refused_model(ModelFacts(architecture="LlamaForCausalLM", tied_embeddings=True)) is None


def test_tied_embeddings_are_refused_where_sglang_forgets_the_tie() -> None:
    def tied(name: str) -> ModelFacts:
        return ModelFacts(architecture=name, num_experts=8, tied_embeddings=True)

    assert "lm_head" in str(refused_model(tied("Qwen3MoeForCausalLM")))
    assert refused_model(tied("DeepseekV2ForCausalLM")) is None


@pytest.mark.parametrize(
    ("fact", "word"),
    [
        ({"encoder_decoder": True}, "encoder-decoder"),
        ({"multimodal": True}, "multimodal"),
        ({"generates": False}, "embeddings"),
        ({"recurrent_layers": True}, "recurrent"),
        ({"sliding_window_layers": True}, "sliding-window"),
        ({"quantization": Quantisation("bitsandbytes")}, "quantised (bitsandbytes)"),
        ({"quantization": BLOCKS, "num_experts": 8}, "Qwen3MoeForCausalLM"),
        ({"quantization": BLOCKS}, "OtherForCausalLM in fp8 is not tested"),
        ({"num_experts": 8}, "Qwen3MoeForCausalLM"),
    ],
)
def test_what_can_not_be_served_says_why(fact: dict[str, object], word: str) -> None:
    refusal = refused_model(ModelFacts(architecture="OtherForCausalLM", **fact))  # type: ignore[arg-type]
    assert word in str(refusal)


DEEPSEEK = {  # a dense layer, and two with experts
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
}


def test_layers_whose_experts_sglang_builds_without_us_are_refused_by_name() -> None:
    assert refused_layers(DEEPSEEK, built="DeepseekV2ForCausalLM", paged=[1, 2]) is None
    for paged, num_unpaged in (([], 2), ([2], 1)):
        words = str(refused_layers(DEEPSEEK, built="OtherForCausalLM", paged=paged))
        assert words.startswith("DeepseekV2ForCausalLM has experts in 2 layers")
        assert f"as OtherForCausalLM, in which those of {num_unpaged} can't be paged" in words


@pytest.mark.parametrize(
    "said",
    [
        {"num_experts": 16},
        {"num_local_experts": 16},
        {"n_routed_experts": 16},
        {"moe_num_experts": 16},
        {"ffn_config": {"moe_num_experts": 16}},
    ],
)
def test_however_a_config_calls_them_experts_are_counted(said: dict[str, object]) -> None:
    assert num_experts_of(said) == 16


def test_a_model_that_has_no_experts_needs_no_paged_layers() -> None:
    dense = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3}
    assert refused_layers(dense, built="LlamaForCausalLM", paged=[]) is None


def qwen3_in_fp8(**facts: object) -> ModelFacts:
    known = {"num_experts": 128, "hidden_size": 2048, "expert_inner_size": 768} | facts
    known = {"quantization": BLOCKS} | known
    return ModelFacts(architecture="Qwen3MoeForCausalLM", **known)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("capability", [None, (8, 9), (9, 0), (12, 0)])
def test_block_fp8_is_served(dtype: str, capability: tuple[int, int] | None) -> None:
    """On a CPU, an RTX 4090, an H100, an RTX 5090."""
    assert refused_model(qwen3_in_fp8(dtype=dtype, capability=capability)) is None


@pytest.mark.parametrize(
    ("fact", "words"),
    [
        ({"quantization": Quantisation("fp8")}, "(fp8, weight_block_size none)"),
        ({"quantization": Quantisation("fp8", (1, 128))}, "(fp8, weight_block_size [1, 128])"),
        ({"quantization": Quantisation("mxfp8", (32, 32))}, "(mxfp8)"),
        ({"expert_inner_size": 704}, "hidden size 2048 and inner size 704 in fp8 blocks of 128"),
        ({"hidden_size": 2000}, "hidden size 2000 and inner size 768 in fp8 blocks of 128"),
        ({"dtype": "float32"}, "--dtype=float32"),
        ({"capability": (8, 6)}, "compute capability 8.6, and Triton has fp8 from 8.9 on"),
    ],
)
def test_other_fp8_is_refused_by_name(fact: dict[str, object], words: str) -> None:
    assert words in str(refused_model(qwen3_in_fp8(**fact)))


def test_a_checkpoint_says_in_its_config_how_it_is_quantised() -> None:
    assert quantisation_of({}) is None
    assert quantisation_of({"quantization_config": None}) is None
    other = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    assert quantisation_of({"quantization_config": other}) == Quantisation("compressed-tensors")
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    assert quantisation_of({"quantization_config": fp8}) == BLOCKS
