"""What is bundled is a whole checkpoint, small enough to travel, and installed with the package."""

import json
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import sglmoe
from sglmoe.checkpoint import check_checkpoint
from sglmoe.demo_model import DEMO_MODEL

MEGABYTE = 10**6


def test_the_checkpoint_is_whole_and_small() -> None:
    check_checkpoint(DEMO_MODEL)
    weights = [file.stat().st_size for file in DEMO_MODEL.glob("*.safetensors")]
    assert 8 * MEGABYTE < sum(weights) <= 10 * MEGABYTE


def test_it_has_experts_enough_to_page() -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["dtype"] == "bfloat16"
    layers, experts = config["num_hidden_layers"], config["num_local_experts"]
    assert (layers, experts, config["num_experts_per_tok"]) == (6, 32, 4)


def test_every_file_is_installed_with_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["sglmoe"]
    package = Path(sglmoe.__file__).parent
    files = [str(file.relative_to(package)) for file in DEMO_MODEL.iterdir()]
    assert {"tokenizer.json", "tokenizer_config.json"} <= {Path(file).name for file in files}
    assert all(any(fnmatch(file, pattern) for pattern in patterns) for file in files)
