"""Weights in fp8 with a scale for each block, in plain torch: what a CPU computes with.

On a GPU nothing is dequantised: SGLang's kernels multiply fp8 by fp8 and scale sums (`worker/moe_layer_grouped.py`).
"""

import torch


def dequantise(
    weight: torch.Tensor, scale: torch.Tensor, *, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Each weight times the scale of its block, in float32, then rounded to `dtype`: `[n, k]`.

    `weight`: float8_e4m3fn `[n, k]`; `scale`: float32 `[ceil(n / rows), ceil(k / columns)]`. SGLang's `block_quant_dequant`.
    """
    height, width = weight.shape
    scale = scale.repeat_interleave(rows, 0)[:height].repeat_interleave(columns, 1)[:, :width]
    return (weight.to(torch.float32) * scale).to(dtype)
