"""Decodes packed tensors on a GPU, in Triton: one launch for many tensors of one size, each straight to its place.

Compiled for sm_80, sm_89 and sm_90 and run in Triton's interpreter by the tests; no GPU has run it.
"""

import torch
import triton
import triton.language as tl

from sglmoe.kernels.exponent_codec import layout
from sglmoe.kernels.exponent_codec.tiles import (
    CODES_BYTES,
    HEADER_BYTES,
    TILE_BYTES,
    TILE_VALUES,
    aligned,
    decode_codes,
    value_of,
)
from sglmoe.units import ceil_div

RAW = tl.constexpr(int(layout.Form.RAW))
# A tile of Gaussian weights has 25 escapes.
ESCAPES_AT_ONCE = tl.constexpr(64)
# 64 threads: each has four neighbours of a row, and loads and stores whole words.
NUM_WARPS = 2


def decode_tensors(
    packed: torch.Tensor,
    sources: torch.Tensor,
    target: torch.Tensor,
    targets: torch.Tensor,
    *,
    num_values: int,
) -> None:
    """Decode tensor i, which begins at byte `sources[i]` of `packed`, to value `targets[i]` of `target` and on.

    `packed`: uint8 `[bytes]`, checked when it was read: what it says is believed. `target`: `[values]` of any 2-byte dtype.
    `sources`, `targets`: int64 `[tensors]`, sources multiples of 16, targets of 8. All on one device, every tensor of
    `num_values`. Queued on the current stream.
    """
    if not sources.numel() or not num_values:
        return
    grid = (ceil_div(num_values, layout.TILE_VALUES), sources.numel())
    decode_tile[grid](
        packed, sources, target.view(torch.int16), targets, num_values, num_warps=NUM_WARPS
    )


@triton.jit
def decode_tile(packed, sources, target, targets, num_values):
    """One tile of one tensor. `num_values`: of each tensor."""
    tile = tl.program_id(0)
    source = packed + tl.multiple_of(tl.load(sources + tl.program_id(1)), 16)
    start = tile.to(tl.int64) * TILE_VALUES
    values = target + tl.multiple_of(tl.load(targets + tl.program_id(1)), 8) + start
    num_left = num_values - start
    if _load_uint32(source + 12) == RAW:
        _copy_tile(source + HEADER_BYTES + 2 * start, values, num_left)
    else:
        num_tiles = tl.cdiv(num_values, TILE_VALUES).to(tl.int64)
        num_escapes = _load_uint32(source + 8).to(tl.int64)
        first_escape = source + HEADER_BYTES
        base = first_escape + aligned(4 * (num_tiles + 1))
        position = base + aligned(num_tiles)
        exponent = position + aligned(2 * num_escapes)
        bytes_of_tile = exponent + aligned(num_escapes) + tile.to(tl.int64) * TILE_BYTES
        decode_codes(bytes_of_tile, tl.load(base + tile).to(tl.int32), values, num_left)
        tl.debug_barrier()  # an escape replaces what another thread has just written
        first = _load_uint32(first_escape + 4 * tile).to(tl.int32)
        stop = _load_uint32(first_escape + 4 * tile + 4).to(tl.int32)
        for escape in range(first, stop, ESCAPES_AT_ONCE):
            _put_escapes(bytes_of_tile, position, exponent, escape, stop, values, num_left)


@triton.jit
def _put_escapes(bytes_of_tile, position, exponent, first, stop, values, num_left):
    escape = first + tl.arange(0, ESCAPES_AT_ONCE)
    exists = escape < stop
    low = tl.load(position + 2 * escape, mask=exists, other=0).to(tl.int32)
    high = tl.load(position + 2 * escape + 1, mask=exists, other=0).to(tl.int32)
    place = low | (high << 8)
    exponents = tl.load(exponent + escape, mask=exists, other=0).to(tl.int32)
    sign = tl.load(bytes_of_tile + CODES_BYTES + place, mask=exists, other=0)
    tl.store(values + place, value_of(sign, exponents), mask=exists & (place < num_left))


@triton.jit
def _copy_tile(raw, values, num_left):
    place = tl.arange(0, TILE_VALUES)
    exists = place < num_left
    low = tl.load(raw + 2 * place, mask=exists, other=0).to(tl.int32)
    high = tl.load(raw + 2 * place + 1, mask=exists, other=0).to(tl.int32)
    tl.store(values + place, (low | (high << 8)).to(tl.int16), mask=exists)


@triton.jit
def _load_uint32(place):
    """Four bytes, little endian."""
    word = tl.load(place).to(tl.uint32)
    word |= tl.load(place + 1).to(tl.uint32) << 8
    word |= tl.load(place + 2).to(tl.uint32) << 16
    return word | (tl.load(place + 3).to(tl.uint32) << 24)
