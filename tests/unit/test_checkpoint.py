"""Whole and broken checkpoints, each of a few bytes."""

import json
from pathlib import Path

import pytest

from sglmoe.checkpoint import INDEX_FILE, check_checkpoint


def write_shard(path: Path, *, tensor_bytes: int = 4) -> None:
    header = {"w": {"dtype": "U8", "shape": [tensor_bytes], "data_offsets": [0, tensor_bytes]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(tensor_bytes))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    write_shard(tmp_path / "1.safetensors")
    write_shard(tmp_path / "2.safetensors")
    return tmp_path


def test_a_whole_checkpoint_passes(checkpoint: Path) -> None:
    check_checkpoint(checkpoint)


def test_one_file_needs_no_index(checkpoint: Path) -> None:
    (checkpoint / INDEX_FILE).unlink()
    check_checkpoint(checkpoint)


def refusal(checkpoint: Path) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the callers look at the words
        check_checkpoint(checkpoint)
    return str(raised.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").endswith("nowhere is not a folder with a checkpoint")


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    (checkpoint / "2.safetensors").unlink()
    assert "2.safetensors is missing" in refusal(checkpoint)


def test_a_truncated_shard_is_named_with_both_sizes(checkpoint: Path) -> None:
    shard = checkpoint / "2.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert f"has {len(whole) - 1} bytes and should have {len(whole)}" in refusal(checkpoint)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 16])
def test_what_is_no_safetensors_file_is_named(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "1.safetensors").write_bytes(content)
    assert "1.safetensors is truncated or no safetensors file" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["config.json", INDEX_FILE])
@pytest.mark.parametrize("content", ["", '{"weight_map": {"a', "[]"])
def test_broken_json_is_named(checkpoint: Path, name: str, content: str) -> None:
    (checkpoint / name).write_text(content)
    assert name in refusal(checkpoint)


def test_a_folder_without_weights_is_refused(checkpoint: Path) -> None:
    for file in [*checkpoint.glob("*.safetensors"), checkpoint / INDEX_FILE]:
        file.unlink()
    assert "has no *.safetensors files" in refusal(checkpoint)
