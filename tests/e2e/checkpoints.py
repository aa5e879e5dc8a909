"""Tiny random checkpoints of every family we serve, in the layout of the published ones.

A random model is a poor oracle when its choices are near-ties: two correct implementations round
differently and part ways. So the output head is fitted to the states that the network itself
reaches (`_fit_head`), and the chosen token leads by more than bfloat16 can move. Knows nothing of
SGLang.
"""

import argparse
import json
import math
import re
import shutil
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import transformers
from int4_packing import quantise
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from eval.demo_model.tokenizer import SPECIAL_TOKENS, train_tokenizer, with_chat_template

VOCAB_SIZE = 1024
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Logit of a chosen token; the others are below 3. Sampling at temperature 1 still varies.
CHOSEN_LOGIT = 8.0

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def _qwen3_moe() -> PretrainedConfig:
    return transformers.Qwen3MoeConfig(
        **_SIZES,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )


def _qwen2_moe() -> PretrainedConfig:
    return transformers.Qwen2MoeConfig(
        **_SIZES,
        num_key_value_heads=2,
        intermediate_size=256,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=4,
    )


def _mixtral() -> PretrainedConfig:
    return transformers.MixtralConfig(
        **_SIZES,
        num_key_value_heads=2,
        intermediate_size=64,
        num_local_experts=8,
        num_experts_per_tok=2,
    )


def _deepseek_v2() -> PretrainedConfig:
    """As DeepSeek-V2: MLA, yarn rope, grouped routing, shared experts, a dense first layer."""
    return transformers.DeepseekV2Config(
        **_SIZES,
        num_key_value_heads=4,
        intermediate_size=256,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
        moe_layer_freq=1,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=3,
        topk_method="group_limited_greedy",
        scoring_func="softmax",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.0,
        norm_topk_prob=False,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    )


def _olmoe() -> PretrainedConfig:
    return transformers.OlmoeConfig(
        **_SIZES,
        num_key_value_heads=4,
        intermediate_size=64,
        num_experts=32,
        num_experts_per_tok=4,
    )


def _phimoe() -> PretrainedConfig:
    """As Phi-3.5-MoE: LayerNorm, biases, longrope, sparsemixer routing of two experts.

    The head's bias stays 0: SGLang 0.5.23 loads it and leaves it out.
    """
    num_frequencies = 16
    return transformers.PhimoeConfig(
        **_SIZES,
        num_key_value_heads=2,
        intermediate_size=64,
        num_local_experts=16,
        num_experts_per_tok=2,
        attention_bias=True,
        lm_head_bias=True,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 2048,
            "short_factor": [1.0 + index / num_frequencies for index in range(num_frequencies)],
            "long_factor": [2.0 + index for index in range(num_frequencies)],
            "short_mscale": 1.1,
            "long_mscale": 1.2,
        },
    )


def _qwen3() -> PretrainedConfig:
    """Dense: no experts."""
    return transformers.Qwen3Config(
        **_SIZES, num_key_value_heads=2, head_dim=32, intermediate_size=256
    )


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "mixtral": _mixtral,
    "deepseek_v2": _deepseek_v2,
    "olmoe": _olmoe,
    "phimoe": _phimoe,
    "qwen3": _qwen3,
}


def make_checkpoint(
    family: str,
    directory: Path,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    attention_gain: float = 0.06,
    **sizes: int,
) -> Path:
    """Write a random checkpoint of one of `FAMILIES`, with tokenizer, to `directory`; return it.

    `sizes` are fields of the family's config that are to be others.

    The same arguments give the same weights, rounded to bfloat16 whatever `dtype` says: one seed
    is one model in every dtype. How much states owe to attention is a choice of oracle:

    * 0.06: a token hangs on the last one alone, by a wide margin. For half precision.
    * 1.0: it hangs on the whole context, and one wrong expert in one layer changes 1 % (olmoe) to
      17 % (qwen3_moe) of the tokens; margins are those of any random model. For float32.
    """
    generator = torch.Generator().manual_seed(seed)
    config = FAMILIES[family]()
    config.update(sizes)
    with torch.random.fork_rng(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _randomise(model, attention_gain, generator)
        _fit_head(model, generator)
    model.to(torch.bfloat16).to(getattr(torch, dtype)).save_pretrained(directory)
    _rename_architecture(directory / "config.json")
    make_tokenizer().save_pretrained(directory)
    return directory


class Fp8Checkpoints(NamedTuple):
    """The same weights twice."""

    fp8: Path
    twin: Path  # in bfloat16, each weight what its fp8 and scale stand for


def make_fp8_checkpoints(
    directory: Path, *, block: int, scale_dtype: str = "bfloat16", **options: Any
) -> Fp8Checkpoints:
    """A checkpoint of `qwen3_moe` in fp8 with a scale for each `block` rows and columns, in the layout of
    Qwen3-30B-A3B-FP8, and its twin. `options` are those of `make_checkpoint`.

    Embeddings, head, routers and norms stay in bfloat16.
    """
    twin = make_checkpoint("qwen3_moe", directory / "twin", **options)
    fp8 = directory / "fp8"
    shutil.copytree(twin, fp8)
    tensors = safetensors.torch.load_file(twin / "model.safetensors")
    kept = [name for name, its in tensors.items() if its.dim() != 2 or KEPT.search(name)]
    quantised: dict[str, torch.Tensor] = {name: tensors[name] for name in kept}
    for name in tensors.keys() - quantised.keys():
        weight, scale = _quantise(tensors[name], block, getattr(torch, scale_dtype))
        quantised |= {name: weight, f"{name}_scale_inv": scale}
        blocks = scale.float().repeat_interleave(block, 0).repeat_interleave(block, 1)
        height, width = weight.shape
        tensors[name] = (weight.float() * blocks[:height, :width]).bfloat16()
    safetensors.torch.save_file(quantised, fp8 / "model.safetensors", {"format": "pt"})
    safetensors.torch.save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
        "modules_to_not_convert": [name.removesuffix(".weight") for name in kept],
    }
    (fp8 / "config.json").write_text(json.dumps(config))
    return Fp8Checkpoints(fp8, twin)


class GptqCheckpoints(NamedTuple):
    """The same weights twice."""

    gptq: Path
    twin: Path  # in bfloat16, each weight what stands for it in 4 bits


def make_gptq_checkpoints(
    family: str, directory: Path, *, group: int, has_zeros: bool, left_out: str = "(?!)"
) -> GptqCheckpoints:
    """A checkpoint of `family` in GPTQ, in the layout of Qwen3-30B-A3B-GPTQ-Int4, and its twin.

    Embeddings, head, routers and norms stay in bfloat16, and modules whose names begin with what `left_out` matches.
    Scales are in float16, as published ones have them.
    """
    twin = make_checkpoint(family, directory / "twin")
    gptq = directory / "gptq"
    shutil.copytree(twin, gptq)
    tensors = safetensors.torch.load_file(twin / "model.safetensors")
    quantised = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if tensor.dim() != 2 or KEPT.search(name) or re.match(left_out, module):
            quantised[name] = tensor
            continue
        its = quantise(tensor, group, has_zeros=has_zeros, dtype=torch.float16)
        quantised |= {f"{module}.{what}": part for what, part in its.in_gptq().items()}
        tensors[name] = its.whole(torch.bfloat16)
    safetensors.torch.save_file(quantised, gptq / "model.safetensors", {"format": "pt"})
    safetensors.torch.save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    said = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": not has_zeros}
    said |= {"desc_act": False, "checkpoint_format": "gptq", "lm_head": False}
    said |= {"dynamic": {f"-:{left_out}": {}}}
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return GptqCheckpoints(gptq, twin)


KEPT = re.compile(r"embed_tokens|lm_head|(mlp|block_sparse_moe)\.gate\.|shared_expert_gate")


def _quantise(
    weight: torch.Tensor, block: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each block's largest weight becomes about the largest of fp8."""
    height, width = weight.shape
    rows, columns = -(-height // block), -(-width // block)
    padded = torch.zeros(rows * block, columns * block)
    padded[:height, :width] = weight.float()
    blocks = padded.view(rows, block, columns, block)
    scale = (blocks.abs().amax(dim=(1, 3)) / 448).to(scale_dtype)
    scaled = (blocks / scale.float()[:, None, :, None]).clamp(-448, 448)
    whole = scaled.view(rows * block, columns * block)[:height, :width]
    return whole.contiguous().to(torch.float8_e4m3fn), scale


def _randomise(model: torch.nn.Module, attention_gain: float, generator: torch.Generator) -> None:
    """Unit-gain weights, but for these: signals neither vanish nor explode."""
    gains = {
        r"embed_tokens\.weight$": 5.0,
        r"o_proj\.weight$": attention_gain,
        # Sparsemixer gives each of its two experts a weight of about 1; the others share 1.
        r"down_proj(\.weight)?$": 0.5 if model.config.model_type == "phimoe" else 2.0,
        r"(mlp\.gate|block_sparse_moe\.gate|router)\.weight$": 2.0,  # a few experts dominate
    }
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            is_scale, is_head = name.endswith("norm.weight"), name.startswith("lm_head")
            parameter.copy_(float(is_scale) + (0.0 if is_head else 0.1) * noise)
            continue
        gain = next((gain for pattern, gain in gains.items() if re.search(pattern, name)), 1.0)
        parameter.copy_(gain * noise / math.sqrt(parameter.shape[-1]))
    model.to(torch.bfloat16).to(torch.float32)


def _fit_head(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Make every token call for one other: a cycle through the vocabulary, specials left out.

    The head's row of a token is the mean state of its predecessor in the cycle.
    """
    states = _mean_states(model, generator)
    centre = states.mean(dim=0)
    num_special = len(SPECIAL_TOKENS)
    cycle = num_special + torch.randperm(VOCAB_SIZE - num_special, generator=generator)
    scale = CHOSEN_LOGIT / (states - centre).norm(dim=-1).mean()
    head = model.get_output_embeddings().weight
    head[cycle.roll(-1)] = scale * torch.nn.functional.normalize(states[cycle] - centre, dim=-1)
    head[:num_special] = -scale * torch.nn.functional.normalize(centre, dim=0)


def _mean_states(model: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
    """What the head sees after each token, averaged over contexts: [VOCAB_SIZE, hidden_size]."""
    num_contexts, context_length = 8, 32
    tokens = torch.cat(
        [torch.randperm(VOCAB_SIZE, generator=generator) for _ in range(num_contexts)]
    )
    hidden = model.model(tokens.view(-1, context_length), use_cache=False).last_hidden_state
    sums = hidden.new_zeros(VOCAB_SIZE, hidden.shape[-1])
    return sums.index_add_(0, tokens, hidden.flatten(0, 1)) / num_contexts


def _rename_architecture(config_file: Path) -> None:
    """Published Phi-3.5-MoE names its own class, which SGLang goes by, not transformers'."""
    text = config_file.read_text()
    config_file.write_text(text.replace("PhimoeForCausalLM", "PhiMoEForCausalLM"))


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    texts = (Path(module.__file__).read_text() for module in (argparse, json, textwrap))
    tokenizer = train_tokenizer(texts, VOCAB_SIZE, split_digits=False)
    return with_chat_template(tokenizer, CHAT_TEMPLATE)
