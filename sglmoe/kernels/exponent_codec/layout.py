"""How a packed tensor lies in memory: a lossless code for bf16 weights at about 70 % of their size.

A weight's eight exponent bits carry 2.6 bits of information, its sign and mantissa nearly all of theirs. As in ZipServ's
TCA-TBE (ASPLOS '26) three bits say which of the most frequent contiguous exponents it is, and values with others, escapes,
are listed beside; unlike there the list says where they are, so that no code has to mean "look it up": eight exponents have
codes, half as many values escape, and nobody counts codes to find a value's place in the list. No tile depends on another.

A packed tensor of N values in M = ceil(N / 2048) tiles, with E escapes; little endian, every section at a multiple of 16 bytes:

| section         | bytes     | what                                                                              |
|-----------------|-----------|-----------------------------------------------------------------------------------|
| header          | 16        | uint64 N, uint32 E, uint32 form: 0 raw, 1 coded                                   |
| first_escape    | 4 (M + 1) | uint32: tile t has the escapes first_escape[t] to first_escape[t + 1] - 1         |
| base            | M         | uint8, at most 248: code c of tile t stands for the exponent base[t] + c          |
| escape_position | 2 E       | uint16: which value of its tile                                                   |
| escape_exponent | E         | uint8: its exponent; what its code says does not count                            |
| tiles           | 2816 M    | tile by tile; the last one is filled up with anything                             |

A raw one is the header (with E = 0) and the N values: for what the code would not make smaller. So nothing ever takes more than
the header and filling beside its own size (`max_packed_bytes`).

A tile has codes of eight values in three bytes, rows of 256 so that decoding is shifts of whole vectors:

| bytes        | what                                                                                             |
|--------------|--------------------------------------------------------------------------------------------------|
| a[256]       | bits 0-2: codes of values 0 .. 255;   3-5: of 768 .. 1023;  6-7: bits 0-1 of d                  |
| b[256]       | bits 0-2: codes of values 256 .. 511; 3-5: of 1024 .. 1279; 6-7: bits 2-3 of d                  |
| c[256]       | bits 0-2: codes of values 512 .. 767; 3-5: of 1280 .. 1535; 6-7: bits 4-5 of d                  |
| (d[256])     | not stored: bits 0-2: codes of values 1536 .. 1791; 3-5: of 1792 .. 2047                         |
| signs [2048] | bit 7: the sign; 0-6: the mantissa, value by value                                               |
"""

from enum import IntEnum

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.units import ceil_div

Bytes = npt.NDArray[np.uint8]

HEADER_BYTES = 16
ALIGN_BYTES = 16
VALUE_BYTES = 2
TILE_VALUES = 2048
ROW_VALUES = TILE_VALUES // 8
CODES_BYTES = 3 * ROW_VALUES
TILE_BYTES = CODES_BYTES + TILE_VALUES
NUM_CODES = 8


class Form(IntEnum):
    """How a packed tensor holds its values."""

    RAW = 0
    CODED = 1


class PackedError(ValueError):
    """These bytes are no packed tensor, or a damaged one."""


class Layout(msgspec.Struct, frozen=True):
    """Where the sections of one packed tensor are, in bytes from its beginning."""

    num_values: int
    num_escapes: int
    form: Form

    @property
    def num_tiles(self) -> int:
        return ceil_div(self.num_values, TILE_VALUES)

    @property
    def first_escape(self) -> int:
        return HEADER_BYTES

    @property
    def base(self) -> int:
        return aligned(self.first_escape + 4 * (self.num_tiles + 1))

    @property
    def escape_position(self) -> int:
        return aligned(self.base + self.num_tiles)

    @property
    def escape_exponent(self) -> int:
        return aligned(self.escape_position + 2 * self.num_escapes)

    @property
    def tiles(self) -> int:
        """Where the tiles begin, or the values of a raw tensor: the bytes of the head."""
        if self.form is Form.RAW:
            return HEADER_BYTES
        return aligned(self.escape_exponent + self.num_escapes)

    @property
    def nbytes(self) -> int:
        """Of the whole packed tensor: a multiple of 16."""
        if self.form is Form.RAW:
            return aligned(HEADER_BYTES + VALUE_BYTES * self.num_values)
        return self.tiles + TILE_BYTES * self.num_tiles

    def header(self) -> Bytes:
        header = np.zeros(HEADER_BYTES, np.uint8)
        header[:8].view("<u8")[0] = self.num_values
        header[8:].view("<u4")[:] = (self.num_escapes, self.form)
        return header


def read_layout(packed: Bytes) -> Layout:
    """The layout that the header, the first bytes of `packed`, says. Raises PackedError."""
    if packed.nbytes < HEADER_BYTES:
        raise PackedError(f"{packed.nbytes} bytes are no packed tensor")
    num_escapes, form = packed[8:HEADER_BYTES].view("<u4").tolist()
    if form not in tuple(Form):
        raise PackedError(f"a packed tensor of form {form}, which this version does not know")
    return Layout(int(packed[:8].view("<u8")[0]), num_escapes, Form(form))


def max_packed_bytes(num_values: int) -> int:
    """No tensor of so many values takes more."""
    return Layout(num_values, 0, Form.RAW).nbytes


def aligned(offset: int) -> int:
    return ceil_div(offset, ALIGN_BYTES) * ALIGN_BYTES
