"""Weights in 4 bits less their zeros, times the scales of their groups."""

import torch
from int4_packing import quantise

from sglmoe.kernels.int4 import dequantise


def test_a_weight_is_less_by_eight_and_times_the_scale_of_its_group() -> None:
    """Two rows of four inputs in groups of two; the first input of a byte is in its lower half."""
    weight = torch.tensor([[0x98, 0xBA], [0x07, 0xF6]], dtype=torch.uint8)
    scale = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    whole = dequantise(weight, scale, None, group=2, dtype=torch.float32)
    assert whole.tolist() == [[0, 1, 20, 30], [-100, -800, -2000, 7000]]


def test_zero_points_are_those_of_a_rows_group() -> None:
    """Of the first group row 0 has 1, row 1 has 2; of the second 3 and 15."""
    weight = torch.full((2, 2), 0x55, dtype=torch.uint8)
    zero = torch.tensor([[0x21, 0xF3]], dtype=torch.uint8)
    scale = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    whole = dequantise(weight, scale, zero, group=2, dtype=torch.float32)
    assert whole.tolist() == [[4, 4, 20, 20], [300, 300, -10000, -10000]]


def test_products_are_rounded_once() -> None:
    """7 times 1.1366 is 7.9562, and 7.96875 in bfloat16. Of 1.1328125, which bfloat16 has for the scale, it would be 7.9375."""
    weight, scale = torch.tensor([[0xFF]], dtype=torch.uint8), torch.tensor([[1.1366]])
    whole = dequantise(weight, scale, None, group=2, dtype=torch.bfloat16)
    assert whole.tolist() == [[7.96875, 7.96875]]


def test_a_quantised_matrix_comes_back_to_half_a_scale() -> None:
    random = torch.Generator().manual_seed(1)
    matrix = torch.randn(16, 64, generator=random)
    for has_zeros in (False, True):
        its = quantise(matrix, 32, has_zeros=has_zeros, dtype=torch.float32)
        pairs = its.values[:, ::2] + 16 * its.values[:, 1::2]
        zeros = (its.zeros[::2] + 16 * its.zeros[1::2]).to(torch.uint8) if has_zeros else None
        whole = dequantise(pairs.to(torch.uint8), its.scales, zeros, group=32, dtype=torch.float32)
        assert torch.equal(whole, its.whole(torch.float32))
        steps = its.scales.repeat_interleave(32, 1)
        assert ((whole - matrix).abs() <= 0.51 * steps).float().mean() > 0.95
