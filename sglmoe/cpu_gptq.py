"""SGLang's linear layers in GPTQ on a CPU: dequantised each time they are used, by torch.

SGLang 0.5.23 has kernels for them for GPUs and for CPUs with AMX. Experts stay `MoeWNA16Method`'s.
"""

from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.gptq.gptq import GPTQConfig
from sglang.srt.layers.quantization.gptq.schemes import GPTQLinearScheme
from sglang.srt.layers.quantization.moe_wna16 import MoeWNA16Config
from torch.nn import functional as F

from sglmoe.kernels.int4 import dequantise


class CpuInt4Config(MoeWNA16Config):
    """SGLang's `moe_wna16`, with a kernel for linear layers."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return super().get_quant_method(layer, prefix)
        config = CpuGptqConfig.from_config(self.full_config)
        config.has_zeros = self.has_zp
        return config.get_quant_method(layer, prefix)


class CpuGptqConfig(GPTQConfig):
    has_zeros = True

    def get_linear_scheme(self, layer: torch.nn.Module) -> GPTQLinearScheme:
        return CpuGptqScheme(self)


class CpuGptqScheme(GPTQLinearScheme):
    def _init_kernel(self, quant_config: CpuGptqConfig) -> "DequantisedLinear":
        return DequantisedLinear(quant_config.group_size, quant_config.has_zeros)


class DequantisedLinear:
    """A layer's weights, `[n, k]` in groups of so many of k, and the product with them."""

    use_shuffle = False  # which a scheme sets, for the kernel that SGLang had

    def __init__(self, group: int, has_zeros: bool):
        self._group, self._has_zeros = group, has_zeros

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """From int32 `[k / 8, n]`, `[k / group, n]` and `[k / group, n / 8]` to what `dequantise` takes."""
        weight, scale, zero = layer.qweight.data, layer.scales.data, layer.qzeros.data
        # Zero points are written less by one.
        pairs = zero.view(torch.uint8) + 0x11 if self._has_zeros else zero.new_empty(0, 0)
        layer.qweight = frozen(weight.T.contiguous().view(torch.uint8))
        layer.scales = frozen(scale.T.contiguous())
        layer.qzeros = frozen(pairs.T.contiguous())
        del layer.g_idx

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """`x` [..., k] times the weights, dequantised to its type."""
        zero = layer.qzeros.data if self._has_zeros else None
        weight = dequantise(
            layer.qweight.data, layer.scales.data, zero, group=self._group, dtype=x.dtype
        )
        return F.linear(x, weight, bias)


def frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)
