"""`eval.parity` sees what it is there to see: one expert with a wrong byte."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from forking import run_in_fork

from eval import parity

pytestmark = pytest.mark.usefixtures("preloaded")


def flip_an_expert(model_dir: Path) -> None:
    """Negate one matrix of one expert of a float32 checkpoint, in place."""
    (path,) = model_dir.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    first = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:first])
    name = next(name for name in header if "experts.3.down_proj" in name)
    start, stop = (first + offset for offset in header[name]["data_offsets"])
    for sign in range(start + 3, stop, 4):
        data[sign] ^= 0x80
    path.write_bytes(data)


def run_parity(model_dir: Path, *flags: str) -> int:
    arguments = [f"--model-path={model_dir}", "--budgets=50%", "--num-tokens=8", "--dtype=float32"]
    return parity.main([*arguments, *flags])


def test_equal_servers_pass_and_a_flipped_expert_is_caught(tmp_path: Path) -> None:
    model_dir = run_in_fork(make_checkpoint, "qwen3_moe", tmp_path / "model", dtype="float32")
    assert run_in_fork(run_parity, model_dir) == 0
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    flip_an_expert(broken)
    assert run_in_fork(run_parity, model_dir, f"--our-flag=--model-path={broken}") == 1
