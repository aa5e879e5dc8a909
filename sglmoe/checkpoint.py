"""Is a local folder a whole checkpoint? Reads file sizes and headers, never weights. Pure but for the files it reads."""

import json
from pathlib import Path
from typing import Any

from sglmoe.errors import checkpoints

INDEX_FILE = "model.safetensors.index.json"
# The format's own limit for the JSON header of a safetensors file.
MAX_HEADER_BYTES = 100_000_000


def check_checkpoint(folder: Path) -> None:
    """Raise ValueError, naming the file, where a checkpoint is missing something, truncated or not JSON."""
    if not folder.is_dir():
        raise checkpoints.not_a_checkpoint(folder=folder)
    read_json(folder / "config.json")
    for shard in find_shards(folder):
        check_shard(shard)


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files that the index names, or all of them where there is no index."""
    index = folder / INDEX_FILE
    if not index.exists():
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            raise checkpoints.no_safetensors(folder=folder)
        return shards
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise checkpoints.no_weight_map(path=index)
    return [folder / name for name in sorted(set(weight_map.values()))]


def check_shard(path: Path) -> None:
    """Compare the file's size with what its own header promises."""
    header, start = read_header(path)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    size_bytes, expected_bytes = path.stat().st_size, start + end
    if size_bytes != expected_bytes:
        raise checkpoints.wrong_size(path=path, size=size_bytes, expected=expected_bytes)


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors of a safetensors file: name -> dtype, shape and `data_offsets`, which count from the byte that is
    returned too. Raises ValueError naming the file."""
    if not path.exists():
        raise checkpoints.missing_file(path=path)
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size_bytes < 8 or header_bytes > min(size_bytes - 8, MAX_HEADER_BYTES):
            raise checkpoints.truncated_file(path=path)
        header = _parse(file.read(header_bytes), path)
    return {name: its for name, its in header.items() if name != "__metadata__"}, 8 + header_bytes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError naming the file."""
    try:
        return _parse(path.read_bytes(), path)
    except OSError as error:
        raise checkpoints.unreadable_file(path=path, why=str(error.strerror)) from None


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise checkpoints.not_json(path=path, why=str(error)) from None
    if not isinstance(value, dict):
        raise checkpoints.no_json_object(path=path)
    return value
