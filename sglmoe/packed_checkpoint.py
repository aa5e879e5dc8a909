"""Packed experts beside a checkpoint: files that hold its expert tensors in a smaller form, and say of which checkpoint.

One file for each layer, whole or not there at all: it is written under another name and renamed. So any of them may be
missing, after a kill for instance, and the tensors of that layer are then read from the checkpoint itself. A file
`layer-00012.packed`, little endian:

| what    | bytes | |
|---------|-------|------------------------------------------------------------------------------------------|
| tensors |       | packed tensors (kernels/exponent_codec/layout.py), each at a multiple of 64 bytes        |
| index   |       | JSON: `LayerIndex`                                                                       |
| trailer | 32    | uint64 where the index begins, uint64 its bytes, uint64 its checksum, 8 bytes `MAGIC`    |

Checksums are xxh3 (64 bits): of the index, looked at when the file is opened, and of each packed tensor, for whoever reads it.
"""

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import xxhash

from sglmoe.checkpoint import read_header
from sglmoe.config import AUTO, OFF, ON
from sglmoe.errors import checkpoints
from sglmoe.errors.user_error import UserError

FOLDER = "packed-experts"  # in the checkpoint's own
PATTERN = "layer-*.packed"
UNFINISHED = ".unfinished"
MAGIC = b"sglmoe\x00\x01"  # the last byte is the version
ALIGN_BYTES = 64
_TRAILER = struct.Struct("<QQQ8s")


class ShardStamp(msgspec.Struct, frozen=True, array_like=True):
    """What tells one file of a checkpoint from another without reading it all."""

    name: str
    size_bytes: int
    modified_nanoseconds: int
    header_checksum: int


class PackedTensor(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A tensor of the checkpoint, and where it lies packed in the same file as the index."""

    name: str
    shard: str
    shard_offset: int  # bytes from the beginning of the shard
    num_bytes: int
    packed_offset: int
    packed_bytes: int
    checksum: int  # of the packed bytes


class LayerIndex(msgspec.Struct, frozen=True):
    """What a file of packed tensors says of itself."""

    shards: list[ShardStamp]  # those that the tensors are from
    tensors: list[PackedTensor]


class PackedLayer(msgspec.Struct, frozen=True):
    """A file of packed tensors whose index is sound, and whose checkpoint is the one it was packed from."""

    path: Path
    index: LayerIndex

    @property
    def num_bytes(self) -> int:
        """Of its tensors before they were packed."""
        return sum(tensor.num_bytes for tensor in self.index.tensors)

    @property
    def packed_bytes(self) -> int:
        return sum(tensor.packed_bytes for tensor in self.index.tensors)


def layer_path(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05d}.packed"


def stamp(shard: Path) -> ShardStamp:
    """Raises ValueError where it is no safetensors file."""
    _, start = read_header(shard)
    with shard.open("rb") as file:
        header = file.read(start)
    status = shard.stat()
    return ShardStamp(
        shard.name, status.st_size, status.st_mtime_ns, xxhash.xxh3_64_intdigest(header)
    )


def write_index(index: LayerIndex, offset: int) -> bytes:
    """What follows the tensors of a file, whose bytes so far are `offset`."""
    content = msgspec.json.encode(index)
    checksum = xxhash.xxh3_64_intdigest(content)
    return content + _TRAILER.pack(offset, len(content), checksum, MAGIC)


def read_layer(path: Path, stamps: Sequence[ShardStamp]) -> PackedLayer:
    """Raises ValueError, saying what to do, for a file that is cut short, damaged, of another version or another checkpoint.

    `stamps`: of the checkpoint's files. The tensors' own bytes are not looked at.
    """
    index = _read_index(path)
    found = {its.name: its for its in stamps}
    for packed in index.shards:
        its = found.get(packed.name)
        if its != packed:
            raise checkpoints.packed_for_another(path=path, difference=_difference(packed, its))
    return PackedLayer(path, index)


def find_layers(
    wanted: str, model_path: str, shards: Iterable[Path]
) -> tuple[list[PackedLayer], list[UserError]]:
    """Those that a server uses, and why it does not use others. `wanted`: `EngineConfig.packed_experts`; `shards`: the files
    that it reads experts from, none where it does not read them in place.

    Raises ValueError, saying what to do, where they are wanted and can't be used.
    """
    if wanted == OFF:
        return [], []
    folder = Path(model_path, FOLDER) if wanted in (AUTO, ON) else Path(wanted)
    paths = sorted(folder.glob(PATTERN))
    stamps = [stamp(shard) for shard in shards] if paths else []
    layers, unused = [], []
    if not paths:
        unused = [checkpoints.none_packed(folder=folder, model_path=model_path)]
    elif not stamps:
        unused = [checkpoints.not_read_in_place()]
    for path in paths if stamps else ():
        try:
            layers.append(read_layer(path, stamps))
        except UserError as error:
            unused.append(error)
    if wanted == AUTO:
        return layers, unused if paths else []
    if unused:
        raise checkpoints.packed_refused(wanted=wanted, why=str(unused[0])) from unused[0]
    return layers, []


def _read_index(path: Path) -> LayerIndex:
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, 2)
            file.seek(max(0, size_bytes - _TRAILER.size))
            trailer = file.read()
            if len(trailer) < _TRAILER.size or trailer[-8:-1] != MAGIC[:-1]:
                raise checkpoints.packed_cut_short(path=path)
            offset, num_bytes, checksum, magic = _TRAILER.unpack(trailer)
            if magic != MAGIC:
                raise checkpoints.packed_of_version(
                    path=path, version=magic[-1], expected=MAGIC[-1]
                )
            if offset + num_bytes + _TRAILER.size != size_bytes:
                raise checkpoints.packed_in_part(path=path)
            file.seek(offset)
            content = file.read(num_bytes)
    except OSError as error:
        raise checkpoints.unreadable_file(path=path, why=str(error.strerror)) from error
    if xxhash.xxh3_64_intdigest(content) != checksum:
        raise checkpoints.packed_index_damaged(path=path)
    try:
        return msgspec.json.decode(content, type=LayerIndex)
    except msgspec.DecodeError as error:
        raise checkpoints.packed_index_damaged(path=path, why=str(error)) from error


def _difference(packed: ShardStamp, its: ShardStamp | None) -> str:
    if its is None:
        return f"it was packed from {packed.name}, which the checkpoint has not"
    if its.size_bytes != packed.size_bytes:
        return f"{packed.name} had {packed.size_bytes} bytes when it was packed, and has {its.size_bytes}"
    if its.header_checksum != packed.header_checksum:
        return f"{packed.name} holds other tensors than when it was packed"
    return f"{packed.name} has been written to, or copied, since it was packed"
