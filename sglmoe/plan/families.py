"""What a model of each served family is made of, by its config alone: names and shapes as in its checkpoint.

For models whose checkpoint is not here; where it is, its headers are read instead (`model_shape.py`).
Pure: knows the published layouts, reads nothing.
"""

from collections.abc import Iterator

from sglmoe.int4_models import Int4, is_left_out
from sglmoe.memory.checkpoint_form import PER_WORD
from sglmoe.supported_models import (
    DEEPSEEK,
    Config,
    architecture_of,
    moe_layers_of,
    num_experts_of,
    quantisation_of,
)
from sglmoe.units import ceil_div

Shapes = dict[str, tuple[int, ...]]

MIXTRAL_LIKE = ("MixtralForCausalLM", "PhiMoEForCausalLM")  # experts are called w1, w2, w3
# SGLANG_ROPE_CACHE_SAFETY_MARGIN and SGLANG_ROPE_CACHE_ALIGN.
ROPE_MARGIN, ROPE_MULTIPLE = 256, 128
# Modules that SGLang has in the model's type whatever a checkpoint says.
NOT_QUANTISED = ("embed_tokens", "lm_head", ".gate", "shared_expert_gate")
SCALE = "_scale_inv"  # behind the name of a weight in fp8
PHI = "PhiMoEForCausalLM"


def inner_size_of(config: Config) -> int:
    """Of a routed expert; 0 where the config says none."""
    return int(config.get("moe_intermediate_size") or config.get("intermediate_size") or 0)


def head_dim_of(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def dense_shapes(config: Config) -> Shapes:
    """Every tensor of the checkpoint but the routed experts'."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
        if config.get("lm_head_bias"):
            shapes["lm_head.bias"] = (vocab,)
    shapes |= _norm(config, "model.norm", hidden)
    moe_layers = set(moe_layers_of(config))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= _norm(config, f"{prefix}.{name}", hidden)
        shapes |= dict(_attention(config, f"{prefix}.self_attn"))
        if layer in moe_layers:
            shapes |= dict(_beside_experts(config, prefix))
        else:
            shapes |= dict(_mlp(f"{prefix}.mlp", hidden, config["intermediate_size"]))
    quantisation = quantisation_of(config)
    if quantisation is None:
        return shapes
    if quantisation.int4:
        return dict(_in_int4(quantisation.int4, shapes))
    return shapes | dict(_scales(config, shapes, *quantisation.block))


def _in_int4(its: Int4, shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of a checkpoint in GPTQ or AWQ: in the place of each weight `[n, k]` what stands for it; `memory/checkpoint_form.py`."""
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        is_linear = kind == "weight" and len(shape) == 2 and not module.endswith(NOT_QUANTISED)
        if not is_linear or is_left_out(its, module):
            yield name, shape
            continue
        n, k = shape
        is_gptq = its.method == "gptq"
        yield f"{module}.qweight", (k // PER_WORD, n) if is_gptq else (k, n // PER_WORD)
        yield f"{module}.scales", (k // its.group, n)
        yield f"{module}.qzeros", (k // its.group, n // PER_WORD)
        if is_gptq:
            yield f"{module}.g_idx", (k,)


def _scales(
    config: Config, shapes: Shapes, rows: int, columns: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of a checkpoint in block fp8: one for each weight but those that it, or SGLang, leaves as they are."""
    said = config["quantization_config"].get("modules_to_not_convert") or ()
    left_out = {module.removeprefix("model.") for module in said}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        is_linear = kind == "weight" and len(shape) == 2 and not module.endswith(NOT_QUANTISED)
        if is_linear and module.removeprefix("model.") not in left_out:
            yield f"{name}{SCALE}", (ceil_div(shape[0], rows), ceil_div(shape[1], columns))


def _norm(config: Config, name: str, size: int) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (size,)}
    if architecture_of(config) == PHI:  # LayerNorm
        shapes[f"{name}.bias"] = (size,)
    return shapes


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def _attention(config: Config, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    if architecture_of(config) == DEEPSEEK:
        yield from _latent_attention(config, prefix)
        return
    architecture, hidden, dim = architecture_of(config), config["hidden_size"], head_dim_of(config)
    query = config["num_attention_heads"] * dim
    key = config.get("num_key_value_heads", config["num_attention_heads"]) * dim
    rows = {"q_proj": query, "k_proj": key, "v_proj": key}
    for name, size in rows.items():
        yield f"{prefix}.{name}.weight", (size, hidden)
        if config.get("attention_bias") or (
            architecture == "Qwen2MoeForCausalLM" and config.get("qkv_bias", True)
        ):
            yield f"{prefix}.{name}.bias", (size,)
    yield f"{prefix}.o_proj.weight", (hidden, query)
    if config.get("attention_bias"):
        yield f"{prefix}.o_proj.bias", (hidden,)
    if architecture.startswith("Qwen3"):
        yield f"{prefix}.q_norm.weight", (dim,)
        yield f"{prefix}.k_norm.weight", (dim,)
    if architecture == "OlmoeForCausalLM":
        yield f"{prefix}.q_norm.weight", (query,)
        yield f"{prefix}.k_norm.weight", (key,)


def _latent_attention(config: Config, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""
    hidden, heads, latent = (
        config["hidden_size"],
        config["num_attention_heads"],
        config["kv_lora_rank"],
    )
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value, query_latent = config["v_head_dim"], config.get("q_lora_rank")
    query = heads * (nope + rope)
    if query_latent:
        yield f"{prefix}.q_a_proj.weight", (query_latent, hidden)
        yield f"{prefix}.q_a_layernorm.weight", (query_latent,)
        yield f"{prefix}.q_b_proj.weight", (query, query_latent)
    else:
        yield f"{prefix}.q_proj.weight", (query, hidden)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (latent + rope, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (latent,)
    yield f"{prefix}.kv_b_proj.weight", (heads * (nope + value), latent)
    yield f"{prefix}.o_proj.weight", (hidden, heads * value)


def _beside_experts(config: Config, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Router and shared experts of a MoE layer."""
    architecture, hidden = architecture_of(config), config["hidden_size"]
    block = f"{prefix}.{'block_sparse_moe' if architecture in MIXTRAL_LIKE else 'mlp'}"
    yield f"{block}.gate.weight", (num_experts_of(config), hidden)
    if architecture == "Qwen2MoeForCausalLM":
        inner = config["shared_expert_intermediate_size"]
        yield from _mlp(f"{block}.shared_expert", hidden, inner)
        yield f"{block}.shared_expert_gate.weight", (1, hidden)
    if architecture == DEEPSEEK and config.get("n_shared_experts"):
        inner = config["n_shared_experts"] * config["moe_intermediate_size"]
        yield from _mlp(f"{block}.shared_experts", hidden, inner)


def rotary_items(config: Config) -> int:
    """Numbers in SGLang's table of cosines and sines, which all layers share and a server counts as dense."""
    positions = int(config.get("max_position_embeddings") or 0)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    original = int(scaling.get("original_max_position_embeddings") or positions)
    # It is made longer than the context, by ROPE_MARGIN at least.
    reserved = ceil_div(positions + ROPE_MARGIN, ROPE_MULTIPLE) * ROPE_MULTIPLE
    if architecture_of(config) == DEEPSEEK:
        rows = max(int(original * scaling.get("factor", 1)), reserved)  # yarn
        return rows * int(config["qk_rope_head_dim"])
    if architecture_of(config) == PHI:  # longrope: the short table, the long one, and both in one
        original = int(config.get("original_max_position_embeddings") or original)
        return 2 * (original + positions) * head_dim_of(config)
    return int(reserved * head_dim_of(config) * config.get("partial_rotary_factor", 1))
