"""Which models can be served: those whose experts we can page, and dense ones.

Pure: judges facts that the front doors read off sglang's ModelConfig.
"""

import msgspec

from sglmoe.errors import models
from sglmoe.errors.user_error import UserError

# Model classes whose expert layers are sglang's FusedMoE with one [w13, w2] pair for each expert.
PAGED_ARCHITECTURES = (
    "Qwen3MoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "MixtralForCausalLM",
    "DeepseekV2ForCausalLM",
    "OlmoeForCausalLM",
    "PhiMoEForCausalLM",
)
# Of these, the ones in which sglang 0.5.23 gives a tied output layer the embedding's weights.
TIED_ARCHITECTURES = ("DeepseekV2ForCausalLM", "PhiMoEForCausalLM")


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What decides whether a model can be served."""

    architecture: str
    num_experts: int = 0  # 0 for a dense model
    quantization: str | None = None
    tied_embeddings: bool = False
    generates: bool = True
    multimodal: bool = False
    encoder_decoder: bool = False
    recurrent_layers: bool = False
    sliding_window_layers: bool = False


def refused_model(model: ModelFacts) -> UserError | None:
    """Why this model can't be served and what to do, or None."""
    name = model.architecture
    if model.encoder_decoder:
        return models.encoder_decoder(name=name)
    if model.multimodal:
        return models.multimodal(name=name)
    if not model.generates:
        return models.not_generating(name=name)
    if model.recurrent_layers:
        return models.recurrent_layers(name=name)
    if model.sliding_window_layers:
        return models.sliding_window_layers(name=name)
    if model.quantization:
        return models.quantised(method=model.quantization)
    return _refused_experts(model) if model.num_experts else None


def _refused_experts(model: ModelFacts) -> UserError | None:
    name = model.architecture
    if name not in PAGED_ARCHITECTURES:
        return models.unknown_family(name=name, known=PAGED_ARCHITECTURES)
    if model.tied_embeddings and name not in TIED_ARCHITECTURES:
        return models.tied_embeddings(name=name)
    return None
