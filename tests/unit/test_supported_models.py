"""Which models are refused, and with which words."""

import pytest

from sglmoe.supported_models import PAGED_ARCHITECTURES, ModelFacts, refused_model


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
        ({"quantization": "fp8"}, "fp8"),
        ({"num_experts": 8}, "Qwen3MoeForCausalLM"),
    ],
)
def test_what_can_not_be_served_says_why(fact: dict[str, object], word: str) -> None:
    refusal = refused_model(ModelFacts(architecture="OtherForCausalLM", **fact))  # type: ignore[arg-type]
    assert word in str(refusal)
