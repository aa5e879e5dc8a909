"""Weights in fp8 times the scales of their blocks."""

import torch

from sglmoe.kernels.block_fp8 import dequantise


def test_a_weight_is_multiplied_by_the_scale_of_its_block() -> None:
    """Blocks of 2 x 3 in a matrix of 3 x 4: the last row and the last column are blocks of their own."""
    weight = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    whole = dequantise(weight, scale, rows=2, columns=3, dtype=torch.float32)
    assert whole.tolist() == [[1, 2, 3, 40], [5, 6, 7, 80], [900, 1000, 1100, 12000]]


def test_products_are_rounded_once() -> None:
    """1.125 * 1.0078125 is 1.1337890625; a scale that were rounded to 3 bits first would be 1."""
    weight = torch.tensor([[1.125]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0078125]])
    (value,) = dequantise(weight, scale, rows=1, columns=1, dtype=torch.bfloat16).flatten()
    assert value == torch.tensor(1.1337890625).bfloat16()
    assert value != 1.125
