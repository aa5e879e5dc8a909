"""A file of packed tensors says what it is and of which checkpoint; a broken or foreign one is refused by name."""

from pathlib import Path

import pytest

from sglmoe.packed_checkpoint import (
    LayerIndex,
    PackedTensor,
    ShardStamp,
    read_layer,
    write_index,
)

STAMP = ShardStamp("model.safetensors", size_bytes=1000, modified_nanoseconds=7, header_checksum=9)
TENSOR = PackedTensor(
    "layers.0.experts.0.up_proj.weight",
    shard="model.safetensors",
    shard_offset=100,
    num_bytes=50,
    packed_offset=64,
    packed_bytes=36,
    checksum=2**64 - 1,
)
INDEX = LayerIndex([STAMP], [TENSOR])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """100 bytes of tensors, then the index."""
    path = tmp_path / "layer-00000.packed"
    path.write_bytes(bytes(100) + write_index(INDEX, 100))
    return path


def test_an_index_comes_back(path: Path) -> None:
    layer = read_layer(path, [STAMP])
    assert layer.index == INDEX
    assert (layer.num_bytes, layer.packed_bytes) == (50, 36)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "other.safetensors"}, "from model.safetensors, which the checkpoint has not"),
        ({"size_bytes": 999}, "had 1000 bytes when it was packed, and has 999"),
        ({"header_checksum": 8}, "holds other tensors than when it was packed"),
        ({"modified_nanoseconds": 8}, "has been written to, or copied, since it was packed"),
    ],
)
def test_another_checkpoint_is_named_with_what_is_different(
    path: Path, change: dict[str, object], message: str
) -> None:
    fields = {name: getattr(STAMP, name) for name in STAMP.__struct_fields__}
    with pytest.raises(ValueError, match=f"{path}.*{message}; run python -m sglmoe.pack again"):
        read_layer(path, [ShardStamp(**(fields | change))])


def test_wherever_a_file_is_cut_it_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{path}.*run python -m sglmoe.pack again"):
            read_layer(path, [STAMP])


def test_whichever_bit_of_the_index_is_flipped_it_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for index in range(100, len(whole)):
        damaged = bytearray(whole)
        damaged[index] ^= 1 << index % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(path)):
            read_layer(path, [STAMP])


def test_a_file_of_another_version_says_so(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\x02")
    with pytest.raises(ValueError, match="has version 2, not 1; delete it"):
        read_layer(path, [STAMP])


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer-00000.packed can't be read: No such file"):
        read_layer(tmp_path / "layer-00000.packed", [STAMP])
