"""Packed experts on a GPU: kept in the arena as they come, decoded from there bit for bit, and timed. Skipped without a GPU.

Sizes are those of Qwen3-30B-A3B's experts.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from sglmoe.memory.arena import Frames
from sglmoe.memory.decode_ratio import DecodeRatio
from sglmoe.memory.device_decode import DecodedFrames, staged_bytes
from sglmoe.memory.device_transfer import DeviceCopier, page_lock
from sglmoe.memory.experts import Load
from sglmoe.memory.host_tier import HostTier, make_blocks
from sglmoe.memory.load_timer import LoadTimer, device_copy_seconds, device_decoding_seconds
from sglmoe.memory.mapped_files import Extent
from sglmoe.memory.packed_extent import PackedExtent
from sglmoe.memory.packed_slabs import PackedSlabs
from sglmoe.memory.promotion import Promotion
from sglmoe.memory.store import PARTS, ExpertStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUM_VALUES = 2048 * 768  # of a tensor
FRAME_BYTES = 2 * NUM_VALUES * len(PARTS)
NUM_EXPERTS, NUM_FRAMES = 8, 16


def packed_store(path: Path, experts: torch.Tensor) -> ExpertStore:
    """`experts`: bf16 `[experts, parts, values]`. There are no originals."""
    from sglmoe.kernels.exponent_codec.encode import encode

    store, offset = ExpertStore(), 0
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    for expert, tensors in enumerate(experts):
        for part, tensor in zip(PARTS, tensors, strict=True):
            packed = encode(tensor).numpy()
            os.pwrite(descriptor, packed.tobytes(), offset)
            store._parts[0, expert, part] = PackedExtent(
                Extent(descriptor, offset, packed.nbytes, str(path)),
                xxhash.xxh3_64_intdigest(packed),
                Extent(-1, 0, 2 * NUM_VALUES, "none"),
            )
            offset += packed.nbytes
    return store


def test_cells_are_filled_and_decoded_on_real_streams(tmp_path: Path) -> None:
    experts = torch.randn((NUM_EXPERTS, len(PARTS), NUM_VALUES)).to(torch.bfloat16)
    store = packed_store(tmp_path / "layer.packed", experts)
    blocks = make_blocks(4 * FRAME_BYTES, store, as_stored=True, lock_pages=page_lock)
    tier = HostTier(blocks, num_layers=1, num_experts=NUM_EXPERTS, as_stored=True)
    block = tier.begin(Promotion(0, 0))
    tier.finish(block, store.read_stored(0, 0, blocks[block]))  # the others come from the file
    arena = torch.zeros(NUM_FRAMES * FRAME_BYTES, dtype=torch.uint8, device="cuda")
    rows, ratio = arena.view(-1, FRAME_BYTES), DecodeRatio()
    into = DecodedFrames(rows, store)
    assert 0 < device_decoding_seconds(into, store) < 1
    assert 0 < device_copy_seconds(rows[0], torch.from_numpy(blocks[0])) < 1
    copier = DeviceCopier(
        arena,
        frame_bytes=FRAME_BYTES,
        store=store,
        tier=tier,
        into=into,
        timer=LoadTimer(ratio),
    )
    slabs = slabs_in_every_second_frame(staged_bytes(store))
    for expected in (False, True, True):
        rows[1::2] = 170  # on the compute stream, which copies wait for
        loads = [
            Load(2 * expert + 1, 0, expert, slabs.begin(0, expert)) for expert in range(NUM_EXPERTS)
        ]
        assert {load.is_packed for load in loads} == {expected}
        copier.load(loads)()
        for expert in range(NUM_EXPERTS):  # on the compute stream, behind the copies
            assert rows[2 * expert + 1].cpu().equal(experts[expert].view(-1).view(torch.uint8))
            slabs.end(0, expert, is_there=True)
    copier.load([])()
    assert 0 < ratio() < 1


def slabs_in_every_second_frame(cell_bytes: int) -> PackedSlabs:
    """All experts have cells; none of their frames are neighbours."""
    frames = Frames(NUM_FRAMES)
    slabs = PackedSlabs(frames, (1, NUM_EXPERTS), frame_bytes=FRAME_BYTES, cell_bytes=cell_bytes)
    taken = [frames.take_for_kv() for _ in range(NUM_FRAMES)]
    for frame in taken[::2]:
        frames.give(frame)
        slabs.grow()
    slabs.hold([(0, expert) for expert in range(NUM_EXPERTS)])
    assert all(np.diff(sorted(slabs.held_frames())) == 2)
    return slabs
