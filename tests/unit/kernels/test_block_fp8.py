"""Weights in fp8 times the scales of their blocks."""

import torch

from sglmoe.kernels.block_fp8 import dequantise


def test_a_weight_is_multiplied_by_the_scale_of_its_block() -> None:
    """A matrix of 4 x 6 in blocks of 2 x 3."""
    weight = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]] * 2)
    scale = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    whole = dequantise(
        weight.to(torch.float8_e4m3fn), scale, rows=2, columns=3, dtype=torch.float32
    )
    assert whole.tolist() == [
        [1, 2, 3, 40, 50, 60],
        [7, 8, 9, 100, 110, 120],
        [100, 200, 300, 4000, 5000, 6000],
        [700, 800, 900, 10000, 11000, 12000],
    ]


def test_blocks_at_the_edges_may_be_smaller() -> None:
    """Blocks of 2 x 3 in a matrix of 3 x 4: the last row and the last column are blocks of their own."""
    weight = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    whole = dequantise(weight, scale, rows=2, columns=3, dtype=torch.float32)
    assert whole.tolist() == [[1, 2, 3, 40], [5, 6, 7, 80], [900, 1000, 1100, 12000]]


def test_every_number_that_fp8_has_is_what_torch_takes_it_for() -> None:
    """Signed, subnormal and zero; all but the two codes that are none. Scales at either end of what is usual."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn).view(2, 127)
    for scale in (1.0, 3.0e-5, 1.2345678, 7.0e8):
        scales = torch.tensor([[scale], [-scale]])
        whole = dequantise(numbers, scales, rows=1, columns=127, dtype=torch.float32)
        assert torch.equal(whole, numbers.to(torch.float32) * scales)


def test_products_are_rounded_once() -> None:
    """1.125 * 1.0078125 is 1.1337890625; a scale that were rounded to 3 bits first would be 1."""
    weight = torch.tensor([[1.125]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0078125]])
    (value,) = dequantise(weight, scale, rows=1, columns=1, dtype=torch.bfloat16).flatten()
    assert value == torch.tensor(1.1337890625).bfloat16()
    assert value != 1.125
