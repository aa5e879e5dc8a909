"""A random checkpoint of a large model's shapes, as fast as the disk takes it: to compare engines on a GPU, not to be read.

    python -m eval.shaped_model --output /tmp/shaped [--layers 12]

By default Qwen3-30B-A3B's, whose 48 layers of 128 experts need not all be there to compare decode steps. A router's
logits have a part that is the same for all tokens, of which `--skew` is the spread: 0 for experts that are used alike. Each
token calls for another one, so that greedy answers wander through the vocabulary. `eval.random_model` makes small ones by
transformers, in memory and in float32, which for these takes too long.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

SEED = 0
# Of an embedding, what is the same for all tokens; the rest has as much. What `--skew` goes by.
COMMON = 1.0

Tensors = dict[str, torch.Tensor]


class Shape(argparse.Namespace):
    layers: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    skew: float
    output: Path


class Random:
    """Weights of unit gain, bf16, made where that is fastest."""

    def __init__(self) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._generator = torch.Generator(self._device).manual_seed(SEED)

    def normal(self, *shape: int, gain: float = 1.0) -> torch.Tensor:
        options: dict[str, Any] = {"generator": self._generator, "device": self._device}
        values: torch.Tensor = torch.randn(shape, **options)
        return values * gain

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        return self.normal(rows, columns, gain=columns**-0.5)


def config_of(its: Shape) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": its.vocab,
        "hidden_size": its.hidden,
        "num_hidden_layers": its.layers,
        "num_attention_heads": its.heads,
        "num_key_value_heads": its.kv_heads,
        "head_dim": its.head_dim,
        "intermediate_size": 3 * its.hidden,
        "moe_intermediate_size": its.inner,
        "num_experts": its.experts,
        "num_experts_per_tok": its.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def layer_tensors(number: int, its: Shape, draw: Random, common: torch.Tensor) -> Tensors:
    query, key = its.heads * its.head_dim, its.kv_heads * its.head_dim
    ones = torch.ones(its.hidden)
    popularity = draw.normal(its.experts, 1, gain=its.skew / its.hidden**0.5)
    tensors = {
        "input_layernorm.weight": ones,
        "post_attention_layernorm.weight": ones,
        "self_attn.q_proj.weight": draw.matrix(query, its.hidden),
        "self_attn.k_proj.weight": draw.matrix(key, its.hidden),
        "self_attn.v_proj.weight": draw.matrix(key, its.hidden),
        "self_attn.o_proj.weight": draw.matrix(its.hidden, query),
        "self_attn.q_norm.weight": torch.ones(its.head_dim),
        "self_attn.k_norm.weight": torch.ones(its.head_dim),
        "mlp.gate.weight": draw.matrix(its.experts, its.hidden) + popularity * common,
    }
    for expert in range(its.experts):
        name = f"mlp.experts.{expert}"
        tensors[f"{name}.gate_proj.weight"] = draw.matrix(its.inner, its.hidden)
        tensors[f"{name}.up_proj.weight"] = draw.matrix(its.inner, its.hidden)
        tensors[f"{name}.down_proj.weight"] = draw.matrix(its.hidden, its.inner)
    return {f"model.layers.{number}.{name}": tensor for name, tensor in tensors.items()}


def shards(its: Shape) -> Iterator[Tensors]:
    """One for each layer, and one for the rest."""
    draw = Random()
    common = torch.sign(draw.normal(1, its.hidden))
    embeddings = draw.normal(its.vocab, its.hidden)
    cycle = torch.randperm(its.vocab, generator=torch.Generator().manual_seed(SEED))
    cycle = cycle.to(embeddings.device)
    head = torch.empty_like(embeddings)
    head[cycle.roll(-1)] = embeddings[cycle]
    yield {
        "model.embed_tokens.weight": embeddings + COMMON * common,
        "model.norm.weight": torch.ones(its.hidden),
        "lm_head.weight": head,
    }
    for number in range(its.layers):
        yield layer_tensors(number, its, draw, common)


def write(its: Shape) -> None:
    its.output.mkdir(parents=True, exist_ok=True)
    (its.output / "config.json").write_text(json.dumps(config_of(its), indent=1))
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, shard in enumerate(tqdm(shards(its), total=its.layers + 1, unit="file")):
        name = f"model-{number:05d}.safetensors"
        tensors = {key: its.to(torch.bfloat16).cpu().contiguous() for key, its in shard.items()}
        save_file(tensors, its.output / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (its.output / "model.safetensors.index.json").write_text(json.dumps(index))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768, help="of an expert")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--skew", type=float, default=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    add_arguments(parser)
    write(parser.parse_args(namespace=Shape()))


if __name__ == "__main__":
    main()
