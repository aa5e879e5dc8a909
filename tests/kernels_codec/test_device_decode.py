"""Packed experts from a file to the frames of a device, through the real kernel, interpreted."""

import os
from pathlib import Path

import numpy as np
import torch
import xxhash

from sglmoe.kernels.exponent_codec.encode import encode
from sglmoe.memory.device_decode import DecodedFrames
from sglmoe.memory.experts import Load
from sglmoe.memory.mapped_files import Extent
from sglmoe.memory.packed_extent import PackedExtent
from sglmoe.memory.store import PARTS, ExpertStore

NUM_VALUES = 2048 + 512
EXPERT_BYTES = 2 * NUM_VALUES * len(PARTS)
FRAME_BYTES = EXPERT_BYTES + 48


def packed_store(folder: Path, experts: torch.Tensor) -> ExpertStore:
    """`experts`: bf16 `[experts, parts, values]`. There are no originals."""
    store, path = ExpertStore(), folder / "layer.packed"
    packed = [encode(tensor).numpy() for tensor in experts.view(-1, NUM_VALUES)]
    path.write_bytes(b"".join(its.tobytes() for its in packed))
    descriptor = os.open(path, os.O_RDONLY)
    offsets = np.cumsum([0, *(its.nbytes for its in packed)]).tolist()
    for number, (its, offset) in enumerate(zip(packed, offsets, strict=False)):
        expert, part = divmod(number, len(PARTS))
        extent = Extent(descriptor, offset, its.nbytes, str(path))
        original = Extent(-1, 0, 2 * NUM_VALUES, "none")
        store._parts[0, expert, PARTS[part]] = PackedExtent(
            extent, xxhash.xxh3_64_intdigest(its), original
        )
    return store


def test_every_expert_is_decoded_into_its_frame_and_nothing_else_changes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn((4, len(PARTS), NUM_VALUES), generator=generator).to(torch.bfloat16)
    store = packed_store(tmp_path, experts)
    arena = torch.full((6, FRAME_BYTES), 170, dtype=torch.uint8)
    frames = DecodedFrames(arena, store, num_staged=3)  # so one is decoded in a second round
    where = {0: 5, 1: 0, 2: 3, 3: 2}
    block = np.zeros(store.stored_expert_bytes(), np.uint8)
    for expert, frame in where.items():
        store.read_stored(0, expert, block)
        frames.place(Load(frame, 0, expert), block.nbytes).copy_(torch.from_numpy(block))
    frames.flush()
    for expert, frame in where.items():
        assert arena[frame, :EXPERT_BYTES].equal(experts[expert].view(-1).view(torch.uint8))
        assert arena[frame, EXPERT_BYTES:].eq(170).all()
    assert arena[[1, 4]].eq(170).all()
