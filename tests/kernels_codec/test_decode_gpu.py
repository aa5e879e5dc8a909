"""The Triton decoder, interpreted: many tensors a launch, each to its place, the bits of the reference decoder."""

import numpy as np
import pytest
import torch

from sglmoe.kernels.exponent_codec.decode_gpu import decode_tensors
from sglmoe.kernels.exponent_codec.encode import encode
from sglmoe.kernels.exponent_codec.layout import TILE_VALUES, Form, read_layout
from sglmoe.kernels.exponent_codec.reference import decode_reference


def decode_all(tensors: list[torch.Tensor], *, gap: int = 8) -> list[list[int]]:
    """Pack tensors of one size, decode them in one launch, last first, with `gap` values between them that must stay."""
    num_values = tensors[0].numel()
    packed = [encode(tensor) for tensor in tensors]
    sources = np.cumsum([0, *(its.numel() for its in packed)])[:-1]
    stride = -(-num_values // 8) * 8 + gap
    targets = stride * np.arange(len(tensors))[::-1].copy() + gap
    target = torch.full((stride * len(tensors) + gap,), -7, dtype=torch.int16)
    decode_tensors(
        torch.cat(packed),
        torch.from_numpy(sources),
        target.view(torch.bfloat16),
        torch.from_numpy(targets),
        num_values=num_values,
    )
    decoded = []
    for start in targets.tolist():
        decoded.append(target[start : start + num_values].tolist())
        target[start : start + num_values] = -7
    assert (target == -7).all(), "the kernel wrote outside of its tensors"
    return decoded


def gaussian(num_values: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_values, generator=generator).to(torch.bfloat16).view(torch.int16)


def test_every_bf16_value_comes_back() -> None:
    """NaNs with payloads, infinities, subnormals, both zeros; stored raw, since they have all exponents alike."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    assert decode_all([every]) == [every.tolist()]


@pytest.mark.parametrize("num_values", [1, TILE_VALUES - 1, TILE_VALUES, 2 * TILE_VALUES + 5])
def test_whole_and_partial_tiles(num_values: int) -> None:
    tensors = [gaussian(num_values, seed) for seed in range(3)]
    assert decode_all(tensors) == [its.tolist() for its in tensors]


def test_coded_and_raw_tensors_in_one_launch() -> None:
    noise = torch.randint(-(2**15), 2**15, (2 * TILE_VALUES,), dtype=torch.int32).to(torch.int16)
    tensors = [gaussian(2 * TILE_VALUES, 0), noise, gaussian(2 * TILE_VALUES, 1)]
    forms = [read_layout(encode(its).numpy()).form for its in tensors]
    assert forms == [Form.CODED, Form.RAW, Form.CODED]
    assert decode_all(tensors) == [its.tolist() for its in tensors]


def test_a_tile_with_more_escapes_than_are_put_at_once() -> None:
    """A quarter of one tile escapes; the other tiles pay for it, so the tensor is still coded."""
    values = gaussian(4 * TILE_VALUES, 0)
    values[TILE_VALUES : TILE_VALUES + 512] = 0x7F81  # a NaN with a payload
    packed = encode(values).numpy()
    assert read_layout(packed).form is Form.CODED
    assert decode_all([values]) == [values.tolist()]
    assert decode_reference(packed).tolist() == values.view(torch.uint16).tolist()


def test_nothing_to_decode() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    decode_tensors(torch.empty(0, dtype=torch.uint8), empty, torch.empty(0), empty, num_values=5)
