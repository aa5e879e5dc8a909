"""What a plan needs to know of a model, from its config and, where there is one, the headers of its checkpoint.

Never reads a weight. That the sizes are those a server ends up with is `tests/e2e/test_plan.py`'s to say.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sglmoe.checkpoint import find_shards, read_header, read_json
from sglmoe.errors import models
from sglmoe.errors.options import not_a_choice
from sglmoe.memory.arena import CPU_INNER_MULTIPLE
from sglmoe.memory.expert_layout import (
    ITEM_BYTES,
    W4A16,
    BlockFp8,
    ExpertFormat,
    Plain,
    plan_layout,
)
from sglmoe.plan.families import (
    SCALE,
    Shapes,
    dense_shapes,
    head_dim_of,
    inner_size_of,
    rotary_items,
)
from sglmoe.supported_models import (
    DEEPSEEK,
    Config,
    ModelFacts,
    architecture_of,
    moe_layers_of,
    num_experts_of,
    quantisation_of,
    refused_model,
)
from sglmoe.units import ceil_div

# To which SGLang pads the vocabulary: DEFAULT_VOCAB_PADDING_SIZE.
VOCAB_MULTIPLE = 64
# Of dense weights in fp8; their scales are float32 once loaded, whatever the checkpoint has.
FP8_BYTES, FP8_SCALE_BYTES = 1, 4
# What SGLang's --dtype takes, and torch's names of it.
DTYPES = {its: its for its in ("bfloat16", "float16", "float32")}
DTYPES |= {"half": "float16", "float": "float32"}
# How configs call the longest context, SGLang's CONTEXT_LENGTH_KEYS; the first that is there counts.
CONTEXT_KEYS = (
    *("max_sequence_length", "seq_length", "max_seq_len", "model_max_length"),
    "max_position_embeddings",
)
EXPERT_TENSOR = re.compile(r"\.experts\.\d+\.")


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """A model in numbers of bytes."""

    architecture: str
    num_layers: int
    num_moe_layers: int
    num_experts: int  # routed, of a layer; 0 for a dense model
    top_k: int
    hidden_size: int
    inner_size: int  # of an expert
    expert_bytes: int  # of one
    dense_bytes: int  # everything but the experts: weights and buffers, as the server counts them
    token_bytes: int  # a token's KV in all layers
    token_rows: int  # as so many rows; `memory/arena.py`
    context_tokens: int
    vocab_size: int
    item_bytes: int  # of a number that is computed with, and of a weight that is not quantised
    format: ExpertFormat = Plain(
        "bfloat16"
    )  # of experts, and of dense weights but embeddings and routers

    @property
    def floor_frames(self) -> int:
        """That KV never takes: the experts of one token."""
        return self.top_k if self.num_experts else 0

    @property
    def all_experts(self) -> int:
        return self.num_moe_layers * self.num_experts

    @property
    def all_expert_bytes(self) -> int:
        return self.all_experts * self.expert_bytes


class Model(msgspec.Struct, frozen=True):
    """Where a model was found, and what it looks like."""

    name: str  # for --model-path
    shape: ModelShape
    folder: Path | None = None  # of its checkpoint, whole or in part
    shards: tuple[Path, ...] = ()  # whose headers were read; none if all is from the config


def read_model(
    model_path: str, *, dtype: str = "auto", device: str, config_file: Path | None = None
) -> Model:
    """A local folder, a repository in Hugging Face's cache, or a config file alone.

    Raises ValueError for what can't be served or is not here.
    """
    folder = find_folder(model_path)
    if folder is None and config_file is None:
        raise models.not_here(model_path=model_path)
    config = read_json(config_file or (folder or Path()) / "config.json")
    if why := refused_model(facts_of(config, dtype, device)):
        raise why
    shards = _shards_in(folder) if folder else ()
    shapes = tensor_shapes(shards) if shards else None
    shape = shape_of(config, dense=shapes, dtype=dtype, device=device)
    return Model(name=model_path, shape=shape, folder=folder, shards=shards)


def find_folder(model_path: str) -> Path | None:
    """The folder of a model, here or in Hugging Face's cache; None if it is in neither. Downloads nothing."""
    local = Path(model_path).expanduser()
    if (local / "config.json").exists():
        return local
    if local.exists() or model_path.startswith((".", "/", "~")):
        raise models.no_config(folder=local)
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(model_path, "config.json")
    return Path(os.fspath(cached)).parent if isinstance(cached, str) else None


def _shards_in(folder: Path) -> tuple[Path, ...]:
    """All of the checkpoint's, or none where one is missing: a cache may hold the config alone."""
    try:
        shards = find_shards(folder)
    except ValueError:
        return ()
    return tuple(shards) if all(shard.exists() for shard in shards) else ()


def tensor_shapes(shards: tuple[Path, ...]) -> Shapes:
    """Every dense tensor that the headers name, with its shape."""
    return {
        name: tuple(entry["shape"])
        for shard in shards
        for name, entry in read_header(shard)[0].items()
        if not EXPERT_TENSOR.search(name)
    }


def facts_of(config: Config, dtype: str, device: str) -> ModelFacts:
    """As far as the config alone tells; the server asks SGLang as well. `dtype`: SGLang's --dtype."""
    windows = set(config.get("layer_types") or ())
    return ModelFacts(
        architecture=architecture_of(config),
        num_experts=num_experts_of(config),
        moe_layers=tuple(moe_layers_of(config)),
        hidden_size=int(config.get("hidden_size") or 0),
        expert_inner_size=inner_size_of(config),
        dtype=resolve_dtype(config, dtype),
        quantization=quantisation_of(config),
        on_cpu=device == "cpu",
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        encoder_decoder=bool(config.get("is_encoder_decoder")),
        multimodal="vision_config" in config,
        sliding_window_layers="sliding_attention" in windows,
    )


def shape_of(
    config: Config, *, dense: Mapping[str, tuple[int, ...]] | None, dtype: str, device: str
) -> ModelShape:
    """`dense`: shapes of the tensors that are no routed experts'; None takes them from the config.

    `dtype`: SGLang's --dtype; `device`: torch's name of it. Raises ValueError.
    """
    its_dtype = resolve_dtype(config, dtype)
    item_bytes = ITEM_BYTES[its_dtype]
    num_experts = num_experts_of(config)
    inner, hidden = inner_size_of(config), config["hidden_size"]
    experts = expert_format_of(config, its_dtype)
    if device == "cpu" and isinstance(experts, Plain):
        inner = ceil_div(inner, CPU_INNER_MULTIPLE) * CPU_INNER_MULTIPLE
    expert_bytes = plan_layout(experts, hidden=hidden, inner=inner).num_bytes if num_experts else 0
    shapes = dense_shapes(config) if dense is None else dense
    rows, row_items = _kv_rows(config)
    return ModelShape(
        architecture=architecture_of(config),
        num_layers=config["num_hidden_layers"],
        num_moe_layers=len(moe_layers_of(config)),
        num_experts=num_experts,
        top_k=int(config.get("num_experts_per_tok") or 0),
        hidden_size=hidden,
        inner_size=inner,
        expert_bytes=expert_bytes,
        dense_bytes=_dense_bytes(config, shapes, item_bytes, device),
        token_bytes=rows * row_items * item_bytes,
        token_rows=rows,
        context_tokens=context_tokens_of(config),
        vocab_size=config["vocab_size"],
        item_bytes=item_bytes,
        format=experts,
    )


def expert_format_of(config: Config, dtype: str) -> ExpertFormat:
    """Of a model that is not refused; `dtype` of its activations."""
    its = quantisation_of(config)
    if its is None:
        return Plain(dtype)
    if its.int4:
        return W4A16(dtype, its.int4.group, its.int4.has_zeros, its.int4.method)
    return BlockFp8(*its.block)


def resolve_dtype(config: Config, dtype: str) -> str:
    """SGLang's `_get_and_verify_dtype`: what "auto" means, by torch's name. Raises ValueError."""
    own = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    resolved = {"float32": "float16"}.get(own, own) if dtype == "auto" else dtype
    if resolved not in DTYPES:
        raise not_a_choice(flag="--dtype", given=resolved, choices=list(DTYPES))
    return DTYPES[resolved]


def context_tokens_of(config: Config) -> int:
    """SGLang's `get_context_length`, which multiplies by a scaling of rope that does not say what it scales."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    is_said = "original_max_position_embeddings" in scaling or scaling.get("rope_type") == "llama3"
    factor = 1 if is_said else scaling.get("factor", 1)
    lengths = (config[key] for key in CONTEXT_KEYS if config.get(key) is not None)
    return int(factor * next(lengths, 2048))


def _kv_rows(config: Config) -> tuple[int, int]:
    """Rows of a token in all layers, and numbers in a row."""
    num_layers = config["num_hidden_layers"]
    if architecture_of(config) == DEEPSEEK:
        return num_layers, config["kv_lora_rank"] + config["qk_rope_head_dim"]
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    return 2 * num_layers, heads * head_dim_of(config)


def _dense_bytes(
    config: Config, shapes: Mapping[str, tuple[int, ...]], item_bytes: int, device: str
) -> int:
    """Weights, the vocabulary rounded up as SGLang does, and the rotary table, which is float32 on a GPU.

    Of GPTQ's tensors those are left that kernels read: no `g_idx`, and no zero points where they are all the same.
    """
    vocab, padded = config["vocab_size"], ceil_div(config["vocab_size"], VOCAB_MULTIPLE)
    experts = expert_format_of(config, "")
    has_zeros = isinstance(experts, W4A16) and experts.has_zeros
    int4_bytes = {"qweight": 4, "qzeros": 4 if has_zeros else 0, "g_idx": 0}

    def bytes_of(name: str) -> int:
        if name.endswith(SCALE):
            return FP8_SCALE_BYTES
        if (kind := name.rpartition(".")[2]) in int4_bytes:
            return int4_bytes[kind]
        return FP8_BYTES if f"{name}{SCALE}" in shapes else item_bytes

    weight_bytes = sum(
        math.prod((padded * VOCAB_MULTIPLE, *shape[1:]) if shape[0] == vocab else shape)
        * bytes_of(name)
        for name, shape in shapes.items()
    )
    return weight_bytes + rotary_items(config) * (item_bytes if device == "cpu" else 4)
