"""Decoding word for word as `layout` says, slowly: what the fast decoders are tested against."""

import numpy as np
import numpy.typing as npt

from sglmoe.kernels.exponent_codec.layout import (
    CODES_BYTES,
    HEADER_BYTES,
    ROW_VALUES,
    TILE_BYTES,
    TILE_VALUES,
    Bytes,
    Form,
    read_layout,
)


def decode_reference(packed: Bytes) -> npt.NDArray[np.uint16]:
    """The bits of the values: uint16 `[num_values]`."""
    layout = read_layout(packed)
    assert packed.nbytes == layout.nbytes
    if layout.form is Form.RAW:
        return packed[HEADER_BYTES:].view("<u2")[: layout.num_values].copy()
    first_escape = packed[layout.first_escape :].view("<u4")
    position = packed[layout.escape_position :].view("<u2")
    exponent = packed[layout.escape_exponent :]
    values = np.empty(layout.num_tiles * TILE_VALUES, np.uint16)
    for tile in range(layout.num_tiles):
        its_bytes = packed[layout.tiles + tile * TILE_BYTES :][:TILE_BYTES].astype(np.uint16)
        exponents = int(packed[layout.base + tile]) + _codes(its_bytes[:CODES_BYTES])
        escapes = slice(int(first_escape[tile]), int(first_escape[tile + 1]))
        exponents[position[escapes]] = exponent[escapes]
        signs = its_bytes[CODES_BYTES:]
        its_values = (signs >> 7 << 15) | (exponents << 7) | (signs & 0x7F)
        values[tile * TILE_VALUES :][:TILE_VALUES] = its_values
    return values[: layout.num_values]


def decode_first(packed: Bytes) -> npt.NDArray[np.uint16]:
    """Likewise, of the tensor that `packed` begins with."""
    return decode_reference(packed[: read_layout(packed).nbytes])


def _codes(rows: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Of one tile, value by value."""
    a, b, c = rows.reshape(3, ROW_VALUES)
    d = (a >> 6) | (b >> 6 << 2) | (c >> 6 << 4)
    low = [a & 7, b & 7, c & 7]
    high = [a >> 3 & 7, b >> 3 & 7, c >> 3 & 7]
    return np.concatenate([*low, *high, d & 7, d >> 3 & 7])
