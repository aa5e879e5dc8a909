"""A tensor whose bytes are packed in a file: read piece by piece, checked, and decoded on the way."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec
import numpy as np
import xxhash

from sglmoe.kernels.exponent_codec.layout import (
    HEADER_BYTES,
    TILE_BYTES,
    TILE_VALUES,
    VALUE_BYTES,
    Bytes,
    Form,
    PackedError,
    read_layout,
)
from sglmoe.memory.mapped_files import Extent, UnreadableError

if TYPE_CHECKING:
    from sglmoe.kernels.exponent_codec.decode_cpu import TileDecoder

# Arbitrary: a piece, and what it decodes to, stay in a core's second-level cache.
PIECE_TILES = 128
PIECE_BYTES = PIECE_TILES * TILE_BYTES

EMPTY: Bytes = np.empty(0, np.uint8)

BeforeBytes = Callable[[int], None]  # called with the bytes of each piece before it is taken


class PackedPlace(NamedTuple):
    """Where a tensor of `num_bytes` lies packed."""

    packed: Extent
    checksum: int
    num_bytes: int


class PackedExtent(msgspec.Struct, frozen=True, gc=False):
    """A tensor, packed in a file; `original` is where its `nbytes` lie as they are."""

    packed: Extent
    checksum: int  # xxh3, 64 bits, of the packed bytes
    original: Extent

    @property
    def nbytes(self) -> int:
        return self.original.nbytes

    @property
    def path(self) -> str:
        return self.packed.path

    def will_read(self) -> None:
        self.packed.will_read()

    def read_packed(self, target: Bytes, before_bytes: BeforeBytes) -> None:
        """Fill `target` with the packed bytes. Raises UnreadableError, also where they are not those that were written."""
        reader = _Reader(self, before_bytes)
        for start in range(0, target.nbytes, PIECE_BYTES):
            reader.read_into(target[start : start + PIECE_BYTES])
        reader.check()

    def pack_again(self, target: Bytes, before_bytes: BeforeBytes) -> None:
        """Fill `target` with what the packed bytes should be, from the original. Slow. Raises UnreadableError."""
        import torch  # which nothing else here needs, and which takes seconds

        from sglmoe.kernels.exponent_codec.encode import encode

        original = np.empty(self.nbytes, np.uint8)
        before_bytes(original.nbytes)
        self.original.read_into(memoryview(original.data))
        packed = encode(torch.from_numpy(original).view(torch.int16)).numpy()
        if xxhash.xxh3_64_intdigest(packed) != self.checksum:
            raise UnreadableError("neither it nor its original is what was packed")
        target[:] = packed

    def read_into(self, target: Bytes, before_bytes: BeforeBytes) -> None:
        """Fill `target` with the tensor. Raises UnreadableError as above; then `target` has changed in part."""
        reader = _Reader(self, before_bytes)
        try:
            unpack(reader, self.packed.nbytes, target)
        except PackedError as error:
            raise UnreadableError(str(error)) from error
        reader.check()


class Packed(Protocol):
    """A packed tensor's bytes, from the first one on."""

    def take(self, num_bytes: int) -> Bytes: ...


def unpack(packed: Packed, packed_bytes: int, target: Bytes) -> None:
    """Fill `target` with the tensor. Raises PackedError where the two sizes are not the tensor's."""
    header = packed.take(HEADER_BYTES)
    layout = read_layout(header)
    if (layout.nbytes, VALUE_BYTES * layout.num_values) != (packed_bytes, target.nbytes):
        raise PackedError("it is not as large as its header says")
    if layout.form is Form.RAW:
        for start in range(0, target.nbytes, PIECE_BYTES):
            piece = target[start : start + PIECE_BYTES]
            piece[:] = packed.take(piece.nbytes)
        packed.take(layout.nbytes - HEADER_BYTES - target.nbytes)
        return
    head = np.concatenate([header, packed.take(layout.tiles - HEADER_BYTES)])
    decoder = load_decoder()(layout, head)
    for tile in range(0, layout.num_tiles, PIECE_TILES):
        num_tiles = min(PIECE_TILES, layout.num_tiles - tile)
        values = target[VALUE_BYTES * TILE_VALUES * tile :][: VALUE_BYTES * TILE_VALUES * num_tiles]
        decoder.decode(tile, packed.take(num_tiles * TILE_BYTES), values)


def load_decoder() -> "type[TileDecoder]":
    """What decodes tiles. It is compiled when it is first asked for, which takes a second."""
    from sglmoe.kernels.exponent_codec.decode_cpu import TileDecoder

    return TileDecoder


class InMemory:
    """Packed tensors in memory, as `Packed`: in one piece, or in several that follow each other."""

    def __init__(self, pieces: Sequence[Bytes], before_bytes: BeforeBytes):
        self._pieces = [*pieces]
        self._before_bytes = before_bytes

    def skip(self, num_bytes: int) -> None:
        """Bytes that belong to none."""
        self._take(num_bytes)

    def take(self, num_bytes: int) -> Bytes:
        self._before_bytes(num_bytes)
        return self._take(num_bytes)

    def _take(self, num_bytes: int) -> Bytes:
        parts: list[Bytes] = []
        while self._pieces and (num_bytes or not parts):
            piece = self._pieces[0]
            parts.append(piece[:num_bytes])
            num_bytes -= parts[-1].nbytes
            self._pieces[0] = piece[parts[-1].nbytes :]
            if not self._pieces[0].nbytes:
                del self._pieces[0]
        return parts[0] if len(parts) == 1 else np.concatenate([EMPTY, *parts])


class _Reader:
    """Reads an extent from its beginning to its end, and keeps count of its checksum."""

    def __init__(self, part: PackedExtent, before_bytes: BeforeBytes):
        self._part = part
        self._before_bytes = before_bytes
        self._checksum = xxhash.xxh3_64()
        self._done_bytes = 0

    def take(self, num_bytes: int) -> Bytes:
        taken = np.empty(num_bytes, np.uint8)
        self.read_into(taken)
        return taken

    def read_into(self, target: Bytes) -> None:
        self._before_bytes(target.nbytes)
        self._part.packed.read_into(memoryview(target.data), self._done_bytes)
        self._checksum.update(target.data)
        self._done_bytes += target.nbytes

    def check(self) -> None:
        """Raises UnreadableError where what was read, all of it, is not what was written."""
        assert self._done_bytes == self._part.packed.nbytes
        if self._checksum.intdigest() != self._part.checksum:
            raise UnreadableError("its checksum is not that of what was packed")
