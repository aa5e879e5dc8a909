"""Packs bf16 tensors, in torch: vectorised, and outside the GIL, so that threads pack several at a time."""

from typing import NamedTuple

import numpy as np
import torch

from sglmoe.kernels.exponent_codec.layout import (
    CODES_BYTES,
    HEADER_BYTES,
    NUM_CODES,
    ROW_VALUES,
    TILE_BYTES,
    TILE_VALUES,
    Form,
    Layout,
    max_packed_bytes,
)
from sglmoe.units import ceil_div

# Arbitrary: temporaries of so many tiles (a few MB) stay in the cache.
TILES_AT_ONCE = 128
NUM_EXPONENTS = 256


class CodedTiles(NamedTuple):
    """Some tiles, and what belongs to them in the other sections."""

    base: torch.Tensor  # uint8 [tiles]
    num_escapes: torch.Tensor  # int64 [tiles]
    escape_position: torch.Tensor  # int64 [escapes]
    escape_exponent: torch.Tensor  # uint8 [escapes]
    tiles: torch.Tensor  # uint8 [tiles, TILE_BYTES]


def encode(values: torch.Tensor) -> torch.Tensor:
    """`values`, bf16 of any shape or the same bits as int16, on a CPU: packed, uint8 `[nbytes]`. See `layout`."""
    words = values.detach().contiguous().view(-1).view(torch.int16)
    num_values = words.numel()
    raw_bytes = max_packed_bytes(num_values)
    coded: list[CodedTiles] = []
    num_escapes = 0
    for start in range(0, num_values, TILES_AT_ONCE * TILE_VALUES):
        coded.append(_code_tiles(words[start : start + TILES_AT_ONCE * TILE_VALUES]))
        num_escapes += coded[-1].escape_position.numel()
        if Layout(num_values, num_escapes, Form.CODED).nbytes >= raw_bytes:
            return _raw(words)
    if not coded:
        return _raw(words)
    return _joined(coded, Layout(num_values, num_escapes, Form.CODED))


def _raw(words: torch.Tensor) -> torch.Tensor:
    layout = Layout(words.numel(), 0, Form.RAW)
    packed = torch.zeros(layout.nbytes, dtype=torch.uint8)
    packed[:HEADER_BYTES] = torch.from_numpy(layout.header())
    values = packed[HEADER_BYTES:].view(torch.int16)
    values[: words.numel()] = words
    return packed


def _joined(coded: list[CodedTiles], layout: Layout) -> torch.Tensor:
    packed = torch.zeros(layout.nbytes, dtype=torch.uint8)
    ends = torch.cat([its.num_escapes for its in coded]).cumsum(0)
    first_escape = torch.zeros(layout.num_tiles + 1, dtype=torch.int32)
    first_escape[1:] = ends
    position = torch.cat([its.escape_position for its in coded]).to(torch.int16)
    sections = {
        0: torch.from_numpy(layout.header()),
        layout.first_escape: first_escape,
        layout.base: torch.cat([its.base for its in coded]),
        layout.escape_position: position,
        layout.escape_exponent: torch.cat([its.escape_exponent for its in coded]),
    }
    for offset, section in sections.items():
        section = section.view(torch.uint8)
        packed[offset : offset + section.numel()] = section
    torch.cat([its.tiles for its in coded], out=packed[layout.tiles :].view(-1, TILE_BYTES))
    return packed


def _code_tiles(words: torch.Tensor) -> CodedTiles:
    """int16 `[values]`; all tiles but the last of the tensor are full."""
    num_values = words.numel()
    num_tiles = ceil_div(num_values, TILE_VALUES)
    if num_values < num_tiles * TILE_VALUES:
        filling = words[-1:].expand(num_tiles * TILE_VALUES - num_values)
        words = torch.cat([words, filling])
    words = words.view(num_tiles, TILE_VALUES)
    exponents = ((words >> 7) & 0xFF).to(torch.uint8)
    base = _most_frequent(exponents)
    codes = exponents - base[:, None]  # wraps below the base
    is_escape = codes >= NUM_CODES
    is_escape.view(-1)[num_values:] = False
    # numpy's is five times as fast as torch's where few are.
    escapes = torch.from_numpy(np.flatnonzero(is_escape.numpy()))
    tiles = torch.empty((num_tiles, TILE_BYTES), dtype=torch.uint8)
    _pack_codes(codes & (NUM_CODES - 1), tiles[:, :CODES_BYTES])
    tiles[:, CODES_BYTES:] = ((words >> 8) & 0x80) | (words & 0x7F)
    return CodedTiles(
        base=base,
        num_escapes=torch.bincount(escapes // TILE_VALUES, minlength=num_tiles),
        escape_position=escapes % TILE_VALUES,
        escape_exponent=exponents.view(-1)[escapes],
        tiles=tiles,
    )


def _most_frequent(exponents: torch.Tensor) -> torch.Tensor:
    """Of each tile, the base of the NUM_CODES contiguous exponents that most of its values have: uint8 `[tiles]`."""
    num_tiles = exponents.shape[0]
    bins = exponents.to(torch.int32)
    bins += torch.arange(num_tiles, dtype=torch.int32)[:, None] * NUM_EXPONENTS
    counts = torch.bincount(bins.view(-1), minlength=num_tiles * NUM_EXPONENTS)
    up_to = torch.zeros((num_tiles, NUM_EXPONENTS + 1), dtype=torch.int64)
    torch.cumsum(counts.view(num_tiles, NUM_EXPONENTS), 1, out=up_to[:, 1:])
    covered = up_to[:, NUM_CODES:] - up_to[:, :-NUM_CODES]
    return covered.argmax(dim=1).to(torch.uint8)


def _pack_codes(codes: torch.Tensor, target: torch.Tensor) -> None:
    """uint8 `[tiles, TILE_VALUES]`, below 8, into `[tiles, CODES_BYTES]`: a, b and c of the layout."""
    rows = codes.view(-1, 8, ROW_VALUES)
    d = rows[:, 6] | (rows[:, 7] << 3)
    abc = target.unflatten(1, (3, ROW_VALUES))
    for index in range(3):
        of_d = ((d >> (2 * index)) & 3) << 6
        abc[:, index] = rows[:, index] | (rows[:, 3 + index] << 3) | of_d
