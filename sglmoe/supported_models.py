"""Which models can be served: those whose experts we can page, and dense ones.

Pure: reads a config.json, and judges facts that the front doors read off sglang's ModelConfig.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sglmoe.errors import models
from sglmoe.errors.user_error import UserError
from sglmoe.int4_models import CAPABILITY, SGLANG_METHOD, Int4, int4_of, refused_int4

Config = Mapping[str, Any]

# Model classes whose expert layers are sglang's FusedMoE with one [w13, w2] pair for each expert.
PAGED_ARCHITECTURES = (
    "Qwen3MoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "MixtralForCausalLM",
    "DeepseekV2ForCausalLM",
    "OlmoeForCausalLM",
    "PhiMoEForCausalLM",
)
# Of these, the ones that are tested with fp8 weights.
FP8_ARCHITECTURES = ("Qwen3MoeForCausalLM",)
# From here on Triton compiles SGLang's grouped GEMM with fp8: tests/kernels/test_fp8.py.
FP8_CAPABILITY = (8, 9)
# Of all, the ones in which sglang 0.5.23 gives a tied output layer the embedding's weights.
TIED_ARCHITECTURES = ("DeepseekV2ForCausalLM", "PhiMoEForCausalLM")
DEEPSEEK = "DeepseekV2ForCausalLM"
# How configs of different families call the number of routed experts in a layer.
NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Quantisation(msgspec.Struct, frozen=True):
    """A checkpoint's `quantization_config`, as far as it decides."""

    method: str
    block: tuple[int, ...] = ()  # rows and columns that share a scale; none where more do
    int4: Int4 | None = None  # of GPTQ and AWQ


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What decides whether a model can be served."""

    architecture: str
    num_experts: int = 0  # 0 for a dense model
    moe_layers: tuple[int, ...] = ()
    hidden_size: int = 0
    expert_inner_size: int = 0
    dtype: str = "bfloat16"  # of activations, torch's name
    quantization: Quantisation | None = None
    on_cpu: bool = False
    capability: tuple[int, int] | None = (
        None  # compute capability; None without a GPU, or if it is not known
    )
    tied_embeddings: bool = False
    generates: bool = True
    multimodal: bool = False
    encoder_decoder: bool = False
    recurrent_layers: bool = False
    sliding_window_layers: bool = False


def architecture_of(config: Config) -> str:
    """SGLang's model class. Raises ValueError where the config names none."""
    names = config.get("architectures") or [""]
    if not names[0]:
        raise models.no_architecture()
    return str(names[0])


def num_experts_of(config: Config) -> int:
    """Routed experts of a layer; 0 for a dense model."""
    said = {**config, **(config.get("ffn_config") or {})}  # DBRX's
    return next((int(said[key]) for key in NUM_EXPERTS_KEYS if said.get(key)), 0)


def moe_layers_of(config: Config) -> list[int]:
    """The layers that have routed experts."""
    layers = range(config.get("num_hidden_layers") or 0)
    if not num_experts_of(config):
        return []
    if architecture_of(config) == DEEPSEEK:
        first, every = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
        return [layer for layer in layers if layer >= first and layer % every == 0]
    every, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return [layer for layer in layers if (layer + 1) % every == 0 and layer not in dense]


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
    if why := refused_weights(model):
        return why
    return _refused_experts(model) if model.num_experts else None


def refused_layers(config: Config, *, built: str, paged: Sequence[int]) -> UserError | None:
    """Of a model that SGLang has built, as class `built`: experts that would count as dense weights, or None.

    `paged`: the layers whose experts are paged. SGLang has classes with expert modules of their own, such as
    QuantMixtralForCausalLM, which it takes by the quantisation.
    """
    layers = moe_layers_of(config)
    unpaged = set(layers).difference(paged)
    if not unpaged:
        return None
    return models.unpaged_experts(
        name=architecture_of(config),
        built=built,
        num_unpaged=len(unpaged),
        num_layers=len(layers),
        known=PAGED_ARCHITECTURES,
    )


def quantisation_of(config: Config) -> Quantisation | None:
    """What a config.json says of its checkpoint's weights."""
    said = config.get("quantization_config") or {}
    method = said.get("quant_method")
    if not method:
        return None
    return Quantisation(method, tuple(said.get("weight_block_size") or ()), int4_of(said))


def refused_weights(model: ModelFacts) -> UserError | None:
    """Of quantised weights, SGLang's Triton kernels and our frames take two kinds."""
    its = model.quantization
    if its is None:
        return None
    if its.int4:
        return _refused_int4(model, its.int4)
    if its.method == SGLANG_METHOD:
        return models.not_int4(given=its.method)
    if its.method != "fp8":
        return models.quantised(method=its.method)
    if len(its.block) != 2 or its.block[0] != its.block[1]:
        return models.quantised(method=f"fp8, weight_block_size {list(its.block) or 'none'}")
    if model.architecture not in FP8_ARCHITECTURES:
        return models.fp8_family(name=model.architecture, known=FP8_ARCHITECTURES)
    sizes = (model.hidden_size, model.expert_inner_size)
    if any(size % its.block[0] for size in sizes):
        return models.fp8_uneven_blocks(hidden=sizes[0], inner=sizes[1], block=its.block[0])
    if model.dtype not in ("bfloat16", "float16"):
        return models.fp8_dtype(dtype=model.dtype)
    if model.capability is not None and model.capability < FP8_CAPABILITY:
        given, least = (".".join(map(str, its)) for its in (model.capability, FP8_CAPABILITY))
        return models.fp8_on_older_gpu(capability=given, least=least)
    return None


def _refused_int4(model: ModelFacts, its: Int4) -> UserError | None:
    why = refused_int4(
        its,
        architecture=model.architecture,
        moe_layers=model.moe_layers,
        num_experts=model.num_experts,
        on_cpu=model.on_cpu,
    )
    if why:
        return why
    sizes = (model.hidden_size, model.expert_inner_size)
    if any(size % its.group for size in sizes):
        return models.int4_uneven_groups(hidden=sizes[0], inner=sizes[1], group=its.group)
    if model.dtype not in ("bfloat16", "float16"):
        return models.int4_dtype(dtype=model.dtype)
    if model.capability is not None and model.capability < CAPABILITY:
        given, least = (".".join(map(str, its)) for its in (model.capability, CAPABILITY))
        return models.int4_on_older_gpu(capability=given, least=least)
    return None


def _refused_experts(model: ModelFacts) -> UserError | None:
    name = model.architecture
    if name not in PAGED_ARCHITECTURES:
        return models.unknown_family(name=name, known=PAGED_ARCHITECTURES)
    if model.tied_embeddings and name not in TIED_ARCHITECTURES:
        return models.tied_embeddings(name=name)
    return None
