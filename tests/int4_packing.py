"""Weights in 4 bits as AutoGPTQ and AutoAWQ write them, word by word as these do it."""

from typing import NamedTuple

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Int4Weights(NamedTuple):
    """A matrix `[n, k]` in numbers from 0 to 15, and of each group of k a scale and a zero point: `[n, groups]`."""

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @property
    def group(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """What they stand for. Scales are rounded to `dtype` first, as SGLang does it."""
        scales, zeros = (its.repeat_interleave(self.group, 1) for its in self[1:])
        differences = self.values.float() - zeros.float()
        return (differences * scales.to(dtype).float()).to(dtype)

    def in_gptq(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint, with zero points less by one, as GPTQ's first format has them."""
        k = self.values.shape[1]
        return {
            "qweight": _words(self.values.T, range(8), along=0),
            "scales": self.scales.T.contiguous(),
            "qzeros": _words(self.zeros.T - 1, range(8), along=1),
            "g_idx": torch.arange(k, dtype=torch.int32) // self.group,
        }

    def in_awq(self) -> dict[str, torch.Tensor]:
        """Likewise."""
        return {
            "qweight": _words(self.values.T, AWQ_ORDER, along=1),
            "scales": self.scales.T.contiguous(),
            "qzeros": _words(self.zeros.T, AWQ_ORDER, along=1),
        }


def quantise(
    matrix: torch.Tensor, group: int, *, has_zeros: bool, dtype: torch.dtype
) -> Int4Weights:
    """To nearest: zero points where they must be, or 8. Scales are in `dtype`."""
    n, k = matrix.shape
    groups = matrix.float().view(n, k // group, group)
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    if has_zeros:
        scales = ((high - low) / 15).clamp(min=1e-8).to(dtype)
        zeros = (-low / scales.float()).round().clamp(1, 15)
    else:
        scales = (torch.maximum(-low / 8, high / 7)).clamp(min=1e-8).to(dtype)
        zeros = torch.full_like(low, 8)
    values = (groups / scales.float().unsqueeze(2) + zeros.unsqueeze(2)).round().clamp(0, 15)
    return Int4Weights(values.view(n, k).to(torch.int32), scales, zeros.to(torch.int32))


def _words(values: torch.Tensor, order: tuple[int, ...] | range, *, along: int) -> torch.Tensor:
    """int32 of eight values that follow each other in one dimension; the lowest bits are those of `order[0]`."""
    if along == 1:
        return _words(values.T, order, along=0).T.contiguous()
    words = torch.zeros(values.shape[0] // 8, values.shape[1], dtype=torch.int64)
    for place, which in enumerate(order):
        words |= values[which::8].to(torch.int64) << (4 * place)
    return words.to(torch.int32)
