"""Torch equivalents of SGLang's GPU-only kernels, and their installation through SGLang's hooks.

Each function keeps the contract of what it replaces and computes in the same precision, but for fp8:
a GPU rounds activations to it too, these do not, nor does SGLang's CPU kernel, which needs AMX. Linear layers
in 4 bits are `cpu_gptq.py`'s. Rows are
independent of each other: a request gets the same bits whatever shares its batch.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import xgrammar
from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
from sglang.srt.models.deepseek_common.attention_backend_handler import (
    AttentionBackendRegistry,
    AttnForwardMethod,
)
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch.nn import functional as F

from sglmoe.kernels import block_fp8, int4

MASK_32 = 0xFFFFFFFF


def replace_gpu_kernels() -> None:
    """Replace, in this process, what this module has an equivalent for."""
    replacements = {
        "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add": (
            fused_gate_sigmoid_mul_add
        ),
        "sglang.kernels.ops.sampling.murmur_hash.murmur_hash32": murmur_hash32,
        "sglang.srt.constrained.xgrammar_backend.XGrammarGrammarBackend.apply_vocab_mask": (
            apply_vocab_mask
        ),
        "sglang.srt.mem_cache.pool_host.common._cuda_host_register": skip_host_registration,
    }
    for target, replacement in replacements.items():
        HookRegistry.register(target, replacement, HookType.REPLACE)
    quantised = {
        "sglang.srt.layers.quantization.fp8.Fp8LinearMethod.apply": block_fp8_linear,
        "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe.fused_experts": quantised_experts,
    }
    for target, equivalent in quantised.items():
        HookRegistry.register(target, equivalent, HookType.AROUND)
    HookRegistry.apply_hooks()
    AttentionBackendRegistry.register("torch_native", choose_absorbed_attention)


def fused_gate_sigmoid_mul_add(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """Add the gated output of the shared expert to that of the routed ones, in place.

    All but `gate_weight` [hidden_size] are [num_tokens, hidden_size]; sums are in float32.
    """
    gate = (hidden_states.float() * gate_weight.float()).sum(dim=-1, keepdim=True).sigmoid()
    final_hidden_states.copy_(final_hidden_states.float() + gate * shared_output.float())


class DequantisedExperts:
    """Quantised weights of experts: `[expert]` gives one matrix, as it is multiplied."""

    def __init__(self, matrix: Callable[[int], torch.Tensor]):
        self._matrix = matrix

    def __getitem__(self, expert: int) -> torch.Tensor:
        return self._matrix(expert)


def block_fp8_linear(
    stock: Callable[..., torch.Tensor],
    method: Any,
    layer: torch.nn.Module,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x` [..., k] times weights in fp8 with a scale for each block, dequantised to the type of `x`."""
    if not method.block_quant:
        return stock(method, layer, x, bias)
    rows, columns = method.weight_block_size
    weight, scale = layer.weight.data, layer.weight_scale_inv.data
    whole = block_fp8.dequantise(weight, scale, rows=rows, columns=columns, dtype=x.dtype)
    return F.linear(x, whole, bias)


def quantised_experts(
    stock: Callable[..., torch.Tensor],
    *,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
    **quantised: Any,
) -> torch.Tensor:
    """A layer's routed experts, likewise, for `hidden_states` [num_tokens, hidden_size]."""
    kinds = ("use_fp8_w8a8", "use_int4_w4a16")
    if quantised.get("block_shape") is None or not any(quantised.get(kind) for kind in kinds):
        return stock(
            hidden_states=hidden_states,
            w1=w1,
            w2=w2,
            topk_output=topk_output,
            moe_runner_config=moe_runner_config,
            **quantised,
        )
    layer = SimpleNamespace(
        num_experts=len(w1),
        w13_weight=dequantised_experts("w1", w1, quantised, hidden_states.dtype),
        w2_weight=dequantised_experts("w2", w2, quantised, hidden_states.dtype),
    )
    return moe_forward_native(layer, hidden_states, topk_output, moe_runner_config)


def dequantised_experts(
    name: str, weights: torch.Tensor, quantised: dict[str, Any], dtype: torch.dtype
) -> DequantisedExperts:
    """`name`: what the arguments of `fused_experts` with its scales and zero points begin with."""
    scales, zeros = quantised[f"{name}_scale"], quantised.get(f"{name}_zp")
    rows, columns = quantised["block_shape"]

    def of_fp8(expert: int) -> torch.Tensor:
        return block_fp8.dequantise(
            weights[expert], scales[expert], rows=rows, columns=columns, dtype=dtype
        )

    def of_int4(expert: int) -> torch.Tensor:
        zero = None if zeros is None else zeros[expert]
        return int4.dequantise(weights[expert], scales[expert], zero, group=columns, dtype=dtype)

    return DequantisedExperts(of_fp8 if quantised.get("use_fp8_w8a8") else of_int4)


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """MurmurHash3 of (64-bit seed, position, column): uint32 [rows, columns].

    `seed` and `positions` are [rows], `col_indices` [columns]. int64 throughout: products wrap
    modulo 2**64, which leaves the 32 bits that count intact.
    """
    rows = seed.to(torch.int64)
    state = torch.zeros_like(rows)
    for word in (rows & MASK_32, (rows >> 32) & MASK_32, positions.to(torch.int64) & MASK_32):
        state = _mix(state, word)
    state = _mix(state.unsqueeze(1), col_indices.to(torch.int64).unsqueeze(0) & MASK_32)
    num_hashed_bytes = 16
    return _finalise(state ^ num_hashed_bytes).to(torch.uint32)


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = _rotate_left((word * 0xCC9E2D51) & MASK_32, 15)
    word = (word * 0x1B873593) & MASK_32
    return (_rotate_left(state ^ word, 13) * 5 + 0xE6546B64) & MASK_32


def _rotate_left(word: torch.Tensor, bits: int) -> torch.Tensor:
    return ((word << bits) | (word >> (32 - bits))) & MASK_32


def _finalise(state: torch.Tensor) -> torch.Tensor:
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & MASK_32
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & MASK_32
    return state ^ (state >> 16)


def apply_vocab_mask(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """Set the logits [rows, vocab_size] of tokens whose bit is 0 to minus infinity, in place."""
    xgrammar.apply_token_bitmask_inplace(logits, vocab_mask, backend="cpu")


def skip_host_registration(
    buffer: torch.Tensor, registration_granularity_bytes: int | None = None
) -> None:
    """Nothing to pin memory for: there is no device. (Routed experts are recorded in such memory.)"""


def choose_absorbed_attention(attn: torch.nn.Module, forward_batch: object) -> AttnForwardMethod:
    """MLA attends in latent space for prefill too.

    SGLang's choice for a backend it does not know expands K and V, which `torch_native` then
    looks for in a cache that holds latents.
    """
    return AttnForwardMethod.MLA
