"""Which models can be served: those whose experts we can page, and dense ones.

Pure: judges facts that the front doors read off sglang's ModelConfig.
"""

import msgspec

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


def refused_model(model: ModelFacts) -> str | None:
    """Why this model can't be served and what to do, or None."""
    name = model.architecture
    if model.encoder_decoder:
        return f"{name} is an encoder-decoder model; sglmoe serves decoders, use unmodified SGLang"
    if model.multimodal:
        return f"{name} is multimodal; only text models work for now, use unmodified SGLang"
    if not model.generates:
        return f"{name} does not generate text; use unmodified SGLang for embeddings and scores"
    if model.recurrent_layers:
        return f"{name} has recurrent layers, whose state is not paged yet; use unmodified SGLang"
    if model.sliding_window_layers:
        return f"{name} has sliding-window layers, whose KV is not paged yet; use unmodified SGLang"
    if model.quantization:
        return (
            f"the checkpoint is quantised ({model.quantization}), which can't be paged yet; "
            "use a bf16, fp16 or fp32 one"
        )
    return _refused_experts(model) if model.num_experts else None


def _refused_experts(model: ModelFacts) -> str | None:
    name = model.architecture
    if name not in PAGED_ARCHITECTURES:
        return (
            f"the experts of {name} can't be paged yet; these can: {', '.join(PAGED_ARCHITECTURES)}"
        )
    if model.tied_embeddings and name not in TIED_ARCHITECTURES:
        return (
            f"{name} with tie_word_embeddings=true: SGLang 0.5.23 does not tie the output layer "
            "and would answer garbage; save the checkpoint with an lm_head of its own"
        )
    return None
