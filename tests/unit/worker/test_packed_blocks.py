"""Where tensors lie in blocks of host memory that hold experts as they are stored: packed, stored raw, or not packed at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_packed import TENSOR_BYTES, load_store, make_checkpoint, name_of

from sglmoe import pack
from sglmoe.kernels import reference
from sglmoe.kernels.exponent_codec.page_in_packed import NOT_CODED
from sglmoe.memory.host_tier import HostTier, make_blocks
from sglmoe.memory.promotion import Promotion
from sglmoe.memory.store import ExpertStore
from sglmoe.packed_checkpoint import FOLDER, layer_path
from sglmoe.worker.packed_blocks import new_packed_blocks, where_stored
from sglmoe.worker.packed_experts import use_packed

EXPERT_BYTES = 3 * TENSOR_BYTES
NOISY = name_of(0, 1, "w3")
EXPERTS = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """With a tensor that no code makes smaller."""
    model = make_checkpoint(tmp_path / "model")
    tensors = load_file(model / "1.safetensors")
    noise = torch.randint(-(2**15), 2**15, tensors[NOISY].shape, dtype=torch.int16)
    save_file(tensors | {NOISY: noise.view(torch.bfloat16)}, model / "1.safetensors")
    assert pack.main(["--model-path", str(model)]) == 0
    return model


def new_tier(store: ExpertStore) -> HostTier:
    blocks = make_blocks(8 * EXPERT_BYTES, store, as_stored=True)
    return HostTier(blocks, num_layers=2, num_experts=2, as_stored=True)


def fill(tier: HostTier, store: ExpertStore) -> None:
    """Last first, so no expert is in the block of its number."""
    for layer, expert in reversed(EXPERTS):
        block = tier.begin(Promotion(layer, expert))
        assert block is not None
        tier.finish(block, store.read_stored(layer, expert, tier.blocks[block]))


def page_in(tier: HostTier, store: ExpertStore) -> torch.Tensor:
    """All experts, in order: uint8 `[4, EXPERT_BYTES]`."""
    packed = new_packed_blocks(tier, store, "cpu")
    packed.stored.copy_(torch.from_numpy(where_stored(tier, store)))
    arena = torch.zeros(4 * EXPERT_BYTES, dtype=torch.uint8)
    reference.page_in_packed(
        torch.from_numpy(tier.blocks),
        arena,
        frame_bytes=EXPERT_BYTES,
        its=packed,
        sources=torch.from_numpy(tier.block_table()).flatten(),
        frames=torch.arange(4, dtype=torch.int32),
        count=torch.tensor([4]),
    )
    return arena.view(4, EXPERT_BYTES)


def read(store: ExpertStore) -> torch.Tensor:
    """Likewise, by the host."""
    experts = np.zeros((4, EXPERT_BYTES), np.uint8)
    for place, (layer, expert) in zip(experts, EXPERTS, strict=True):
        store.read(layer, expert, place)
    return torch.from_numpy(experts)


def test_every_tensor_is_found_in_its_block(model: Path) -> None:
    store = load_store(model)
    use_packed(store, "on", str(model))
    tier = new_tier(store)
    fill(tier, store)
    assert where_stored(tier, store)[tier.block_table()[0, 1], :, 1].tolist()[1] == NOT_CODED
    assert torch.equal(page_in(tier, store), read(store))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_that_is_not_packed_is_found_too(model: Path, layer: int) -> None:
    """Its file is gone; or it is damaged, which is seen when it is read, and the layer is packed again."""
    layer_path(model / FOLDER, layer).unlink()
    store = load_store(model)
    use_packed(store, "on", str(model))
    with layer_path(model / FOLDER, 1 - layer).open("r+b") as file:
        file.write(b"damaged")
    tier = new_tier(store)
    fill(tier, store)
    plain = where_stored(tier, store)[tier.block_table()[layer]]
    assert plain[..., 1].tolist() == [[NOT_CODED] * 3] * 2
    assert plain[..., 0].tolist() == [[0, TENSOR_BYTES, 2 * TENSOR_BYTES]] * 2
    assert torch.equal(page_in(tier, store), read(load_store(model)))


def test_tensors_of_an_expert_share_its_tiles_in_groups(model: Path) -> None:
    """Two tiles of 2048 values each, of four that a program takes at a time."""
    store = load_store(model)
    use_packed(store, "on", str(model))
    packed = new_packed_blocks(new_tier(store), store, "cpu")
    starts = [0, TENSOR_BYTES, 2 * TENSOR_BYTES]
    assert packed.parts.tolist() == [[i, start, TENSOR_BYTES] for i, start in enumerate(starts)]
    assert packed.num_groups == 3
    assert packed.stored.shape == (4, 3, 2)
