"""`python -m sglmoe.pack` on a checkpoint of 2 layers of 2 experts: what it writes, and what is left when it is stopped."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import save_file
from tiny_packed import TENSOR_BYTES, make_checkpoint, name_of, tensors_of

from sglmoe import pack
from sglmoe.kernels.exponent_codec.reference import decode_reference
from sglmoe.packed_checkpoint import FOLDER, layer_path, read_layer, stamp


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def run(*arguments: object) -> int:
    return pack.main([str(argument) for argument in arguments])


def check_layer(model: Path, folder: Path, layer: int) -> None:
    """The layer's file has all its tensors, expert by expert as in a frame, and they decode to the checkpoint's."""
    path = layer_path(folder, layer)
    stamps = [stamp(shard) for shard in model.glob("*.safetensors")]
    index = read_layer(path, stamps).index
    assert [its.name for its in index.tensors] == [
        name_of(layer, expert, part) for expert in range(2) for part in ("w1", "w3", "w2")
    ]
    content = np.fromfile(path, np.uint8)
    originals = tensors_of(layer)
    for its in index.tensors:
        assert its.packed_offset % 64 == 0
        packed = content[its.packed_offset : its.packed_offset + its.packed_bytes]
        assert xxhash.xxh3_64_intdigest(packed) == its.checksum
        original = originals[its.name].view(torch.uint16).numpy().tobytes()
        assert decode_reference(packed).tobytes() == original
        with (model / its.shard).open("rb") as shard:
            shard.seek(its.shard_offset)
            assert shard.read(its.num_bytes) == original


def test_all_experts_are_written_and_the_report_says_how_to_serve_them(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--model-path", model) == 0
    for layer in range(2):
        check_layer(model, model / FOLDER, layer)
    assert sorted(path.name for path in (model / FOLDER).iterdir()) == [
        "layer-00000.packed",
        "layer-00001.packed",
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("gate_proj: 4 tensors, 32.00 KiB -> 22.")
    assert lines[3].startswith("all: 12 tensors, 96.00 KiB -> 6")
    assert lines[-1] == f"serve with: python -m sglmoe.launch_server --model-path {model}"


def test_another_folder_is_told_the_server(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--model-path", model, "--output", tmp_path / "elsewhere") == 0
    check_layer(model, tmp_path / "elsewhere", 1)
    assert not (model / FOLDER).exists()
    assert f"--packed-experts {tmp_path}/elsewhere" in capsys.readouterr().out.splitlines()[-1]


def test_a_second_run_writes_only_what_is_missing_or_broken(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--model-path", model)
    first, second = (layer_path(model / FOLDER, layer) for layer in range(2))
    first_was = first.stat().st_ino
    second.write_bytes(second.read_bytes()[:-1])
    capsys.readouterr()
    assert run("--model-path", model) == 0
    output = capsys.readouterr().out
    assert output.startswith("1 of 2 layers are packed already")
    assert "all: 12 tensors" in output
    check_layer(model, model / FOLDER, 1)
    assert first.stat().st_ino == first_was


def test_a_changed_checkpoint_is_packed_again(model: Path) -> None:
    run("--model-path", model)
    changed = tensors_of(1)
    changed[name_of(1, 0, "w1")].mul_(3)
    save_file(changed, model / "2.safetensors")
    before = layer_path(model / FOLDER, 1).read_bytes()
    run("--model-path", model)
    assert layer_path(model / FOLDER, 1).read_bytes() != before
    stamps = [stamp(shard) for shard in model.glob("*.safetensors")]
    for layer in range(2):
        read_layer(layer_path(model / FOLDER, layer), stamps)


def test_a_full_disk_is_said_and_whole_layers_stay(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_index = pack.write_index
    written: list[int] = []

    def full_at_the_second(index: object, offset: int) -> bytes:
        written.append(offset)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_index(index, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(pack, "write_index", full_at_the_second)
    assert run("--model-path", model) == 1
    error = capsys.readouterr().err
    assert f"{model / FOLDER}: No space left on device, after 1 of 2 layers" in error
    assert "or choose another disk with --output" in error
    assert [path.name for path in (model / FOLDER).iterdir()] == ["layer-00000.packed"]
    check_layer(model, model / FOLDER, 0)
    assert run("--model-path", model) == 0
    check_layer(model, model / FOLDER, 1)


def test_too_little_room_is_said_before_anything_is_written(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = pack.shutil.disk_usage(model)
    expected_bytes = int(12 * TENSOR_BYTES * 0.72)
    monkeypatch.setattr(
        pack.shutil, "disk_usage", lambda path: usage._replace(free=expected_bytes - 1)
    )
    assert run("--model-path", model) == 1
    assert "about 69.12 KiB are to be written and 69.12 KiB are free" in capsys.readouterr().err
    assert list((model / FOLDER).iterdir()) == []
    monkeypatch.setattr(
        pack.shutil, "disk_usage", lambda path: usage._replace(free=expected_bytes + 1)
    )
    assert run("--model-path", model) == 0


KILLED_HALF_WAY = """
import os, signal, sys
from sglmoe import pack
pack_tensor, packed = pack.pack_tensor, []
def die_at_the_ninth(tensor):
    packed.append(tensor)
    if len(packed) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return pack_tensor(tensor)
pack.pack_tensor = die_at_the_ninth
pack.main(sys.argv[1:])
"""


def test_a_kill_half_way_leaves_whole_layers_and_the_next_run_goes_on(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first layer has six tensors; it dies while it packs the second."""
    command = [sys.executable, "-c", KILLED_HALF_WAY, "--model-path", str(model), "--threads", "1"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    check_layer(model, model / FOLDER, 0)
    assert not layer_path(model / FOLDER, 1).exists()
    assert run("--model-path", model) == 0
    assert "1 of 2 layers are packed already" in capsys.readouterr().out
    check_layer(model, model / FOLDER, 1)
    assert not list((model / FOLDER).glob("*.unfinished"))


def test_two_at_a_time_do_not_write_into_one_folder(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pack.only_one(model / FOLDER):
        assert run("--model-path", model) == 1
    assert "another python -m sglmoe.pack writes there now" in capsys.readouterr().err
    assert run("--model-path", model) == 0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.0.mlp.up_proj.weight": torch.zeros(4)}, "has no experts"),
        ({name_of(0, 0, "w1"): torch.zeros(4)}, "has experts in F32; only BF16 is packed"),
    ],
)
def test_what_can_not_be_packed_is_refused(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    assert run("--model-path", tmp_path) == 1
    assert f"{tmp_path} {message}" in capsys.readouterr().err
