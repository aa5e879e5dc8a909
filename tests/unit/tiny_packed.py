"""A checkpoint of 2 layers of 2 experts in bf16, 3 x 4096 values each, and something else; for tests of packing."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sglmoe.memory.store import PARTS, ExpertStore

KINDS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
NUM_VALUES = 4096
TENSOR_BYTES = 2 * NUM_VALUES


def name_of(layer: int, expert: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{KINDS[part]}.weight"


def tensors_of(layer: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(layer)
    return {
        name_of(layer, expert, part): torch.randn((64, 64), generator=generator).to(torch.bfloat16)
        for expert in range(2)
        for part in KINDS
    }


def make_checkpoint(folder: Path) -> Path:
    """One shard a layer; the first has a shared expert, which is dense."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    shared = {"model.layers.0.mlp.shared_experts.up_proj.weight": torch.zeros(3, 3)}
    save_file(tensors_of(0) | shared, folder / "1.safetensors")
    save_file(tensors_of(1), folder / "2.safetensors")
    return folder


def load_store(model: Path, *, dtype: torch.dtype = torch.bfloat16) -> ExpertStore:
    """As the model's loader does."""
    store = ExpertStore()
    for layer, shard in enumerate(("1.safetensors", "2.safetensors")):
        with safe_open(model / shard, framework="pt") as file:
            for expert in range(2):
                for part in PARTS:
                    tensor = file.get_tensor(name_of(layer, expert, part)).to(dtype)
                    store.put(layer, expert, part, tensor.view(-1).view(torch.uint8).numpy())
    store.unmap()
    return store
