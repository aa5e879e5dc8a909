"""What kernels that decode packed tensors share: one tile of values that have codes, in Triton."""

import triton
import triton.language as tl

from sglmoe.kernels.exponent_codec import layout

HEADER_BYTES = tl.constexpr(layout.HEADER_BYTES)
ALIGN_BYTES = tl.constexpr(layout.ALIGN_BYTES)
TILE_VALUES = tl.constexpr(layout.TILE_VALUES)
TILE_BYTES = tl.constexpr(layout.TILE_BYTES)
CODES_BYTES = tl.constexpr(layout.CODES_BYTES)
ROW_VALUES = tl.constexpr(layout.ROW_VALUES)


@triton.jit
def decode_codes(bytes_of_tile, base, values, num_left):
    """The values that have codes; what is written for the others has their signs and mantissas.

    All bytes are asked for before the first is waited for: a store between two loads would keep the second back.
    """
    index = tl.arange(0, ROW_VALUES)
    a = tl.load(bytes_of_tile + index).to(tl.int32)
    b = tl.load(bytes_of_tile + ROW_VALUES + index).to(tl.int32)
    c = tl.load(bytes_of_tile + 2 * ROW_VALUES + index).to(tl.int32)
    signs = bytes_of_tile + CODES_BYTES + index
    s0, s1 = tl.load(signs), tl.load(signs + ROW_VALUES)
    s2, s3 = tl.load(signs + 2 * ROW_VALUES), tl.load(signs + 3 * ROW_VALUES)
    s4, s5 = tl.load(signs + 4 * ROW_VALUES), tl.load(signs + 5 * ROW_VALUES)
    s6, s7 = tl.load(signs + 6 * ROW_VALUES), tl.load(signs + 7 * ROW_VALUES)
    d = (a >> 6) | ((b >> 6) << 2) | ((c >> 6) << 4)
    _store_row(0, value_of(s0, base + (a & 7)), values, num_left)
    _store_row(1, value_of(s1, base + (b & 7)), values, num_left)
    _store_row(2, value_of(s2, base + (c & 7)), values, num_left)
    _store_row(3, value_of(s3, base + ((a >> 3) & 7)), values, num_left)
    _store_row(4, value_of(s4, base + ((b >> 3) & 7)), values, num_left)
    _store_row(5, value_of(s5, base + ((c >> 3) & 7)), values, num_left)
    _store_row(6, value_of(s6, base + (d & 7)), values, num_left)
    _store_row(7, value_of(s7, base + (d >> 3)), values, num_left)


@triton.jit
def _store_row(row: tl.constexpr, row_values, values, num_left):
    place = row * ROW_VALUES + tl.arange(0, ROW_VALUES)
    tl.store(values + place, row_values, mask=place < num_left)


@triton.jit
def value_of(sign, exponents):
    """The bits of a bf16, int16. `sign`: the sign and the mantissa, as a tile has them."""
    sign = sign.to(tl.int32)
    return (((sign & 0x80) << 8) | (exponents << 7) | (sign & 0x7F)).to(tl.int16)


@triton.jit
def aligned(num_bytes):
    """Where the section behind so many bytes begins."""
    return (num_bytes + (ALIGN_BYTES - 1)) // ALIGN_BYTES * ALIGN_BYTES
