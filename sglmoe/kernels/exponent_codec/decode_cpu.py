"""Decodes packed tensors on a CPU, in one thread and without the GIL: by numba, on which SGLang depends."""

import numba
import numpy as np
import numpy.typing as npt

from sglmoe.kernels.exponent_codec.layout import (
    CODES_BYTES,
    HEADER_BYTES,
    ROW_VALUES,
    TILE_BYTES,
    TILE_VALUES,
    VALUE_BYTES,
    Bytes,
    Form,
    Layout,
    PackedError,
    read_layout,
)


def decode(packed: Bytes, target: Bytes) -> None:
    """Fill `target`, contiguous and exactly the tensor's bytes, from a whole packed tensor. Raises PackedError."""
    layout = read_layout(packed)
    if packed.nbytes != layout.nbytes:
        raise PackedError(f"{packed.nbytes} bytes where the header says {layout.nbytes}")
    if target.nbytes != VALUE_BYTES * layout.num_values:
        raise PackedError(f"{layout.num_values} values do not fit {target.nbytes} bytes exactly")
    if layout.form is Form.RAW:
        target[:] = packed[HEADER_BYTES : HEADER_BYTES + target.nbytes]
    else:
        TileDecoder(layout, packed[: layout.tiles]).decode(0, packed[layout.tiles :], target)


class TileDecoder:
    """Decodes the tiles of a coded tensor, any run of them at a time. `head` is all that lies before the tiles."""

    def __init__(self, layout: Layout, head: Bytes):
        num_tiles, num_escapes = layout.num_tiles, layout.num_escapes
        self._first_escape = head[layout.first_escape :][: 4 * (num_tiles + 1)].view(np.uint32)
        self._base = head[layout.base :][:num_tiles]
        self._position = head[layout.escape_position :][: 2 * num_escapes].view(np.uint16)
        self._exponent = head[layout.escape_exponent :][:num_escapes]

    def decode(self, first_tile: int, tiles: Bytes, target: Bytes) -> None:
        """The tiles from `first_tile` on, whose bytes `tiles` are, into `target`: as many values as they have, or
        fewer by what fills the last tile up. Raises PackedError."""
        values = target.view(np.uint16)
        num_full = values.size // TILE_VALUES
        self._decode(first_tile, tiles[: num_full * TILE_BYTES], values)
        if rest := values.size % TILE_VALUES:
            whole = np.empty(TILE_VALUES, np.uint16)
            self._decode(first_tile + num_full, tiles[num_full * TILE_BYTES :], whole)
            values[-rest:] = whole[:rest]

    def _decode(self, first: int, tiles: Bytes, values: npt.NDArray[np.uint16]) -> None:
        num_tiles = tiles.nbytes // TILE_BYTES
        is_sound = _decode_tiles(
            self._first_escape[first : first + num_tiles + 1],
            self._base[first : first + num_tiles],
            self._position,
            self._exponent,
            tiles,
            values,
        )
        if not is_sound:
            raise PackedError("the escapes of a packed tensor lie outside of its tiles")


@numba.njit(nogil=True, inline="always")
def _value(sign, exponent):
    return ((sign & 0x80) << 8) | (exponent << 7) | (sign & 0x7F)


@numba.njit(nogil=True, inline="always")
def _decode_tile(codes, signs, base, values):
    for row in range(3):
        for index in range(ROW_VALUES):
            code = codes[row * ROW_VALUES + index]
            low, high = row * ROW_VALUES + index, (row + 3) * ROW_VALUES + index
            values[low] = _value(signs[low], base + (code & 7))
            values[high] = _value(signs[high], base + ((code >> 3) & 7))
    for index in range(ROW_VALUES):
        a, b = codes[index], codes[ROW_VALUES + index]
        d = (a >> 6) | ((b >> 6) << 2) | ((codes[2 * ROW_VALUES + index] >> 6) << 4)
        low, high = 6 * ROW_VALUES + index, 7 * ROW_VALUES + index
        values[low] = _value(signs[low], base + (d & 7))
        values[high] = _value(signs[high], base + (d >> 3))


_U8 = numba.types.Array(numba.uint8, 1, "C", readonly=True)
_U16 = numba.types.Array(numba.uint16, 1, "C", readonly=True)
_U32 = numba.types.Array(numba.uint32, 1, "C", readonly=True)


@numba.njit(numba.boolean(_U32, _U8, _U16, _U8, _U8, numba.uint16[::1]), nogil=True)
def _decode_tiles(
    first_escape: npt.NDArray[np.uint32],
    base: Bytes,
    position: npt.NDArray[np.uint16],
    exponent: Bytes,
    tiles: Bytes,
    values: npt.NDArray[np.uint16],
) -> bool:
    """Whether the escapes are sound: nothing is read or written outside of these arrays even if not."""
    for tile in range(base.size):
        codes = tiles[tile * TILE_BYTES :][:CODES_BYTES]
        signs = tiles[tile * TILE_BYTES + CODES_BYTES :][:TILE_VALUES]
        its_values = values[tile * TILE_VALUES :][:TILE_VALUES]
        _decode_tile(codes, signs, base[tile], its_values)
        start, stop = first_escape[tile], first_escape[tile + 1]
        if start > stop or stop > position.size:
            return False
        for escape in range(start, stop):
            where = position[escape]
            if where >= TILE_VALUES:
                return False
            its_values[where] = (its_values[where] & 0x807F) | (np.uint16(exponent[escape]) << 7)
    return True
