"""Weights in 4 bits with a scale for each group of a row, in plain torch: what a CPU computes with.

On a GPU they are dequantised by SGLang's Triton kernel, a tile at a time, to the same numbers (`worker/moe_layer_grouped.py`).
"""

import torch

MIDDLE = 8  # what stands for zero where no zero points say


def dequantise(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Each weight less its zero, times the scale of its group, in float32, then rounded to `dtype`: `[n, k]`.

    `weight`: uint8 `[n, k / 2]`, the even column in the lower half; `scale`: `[n, k / group]`; `zero`: uint8
    `[n / 2, k / group]`, the even row in the lower half.
    """
    height, width = weight.shape[0], 2 * weight.shape[1]
    values = halves(weight, dim=2).view(height, width // group, group).to(torch.float32)
    values.sub_(MIDDLE if zero is None else halves(zero, dim=1).view(height, -1, 1))
    return values.mul_(scale.to(torch.float32).unsqueeze(2)).view(height, width).to(dtype)


def halves(pairs: torch.Tensor, *, dim: int) -> torch.Tensor:
    """The lower and the upper 4 bits of uint8 `[rows, columns]`, in a new dimension."""
    return torch.stack((pairs & 15, pairs >> 4), dim=dim)
