"""Packed experts on a GPU: paged in by a kernel, or kept in the arena as they come, decoded bit for bit. Skipped without a GPU.

Sizes are those of Qwen3-30B-A3B's experts.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from sglmoe.kernels.exponent_codec.page_in_packed import page_in_packed
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
from sglmoe.worker.packed_blocks import new_packed_blocks, where_stored

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


def test_a_captured_kernel_decodes_what_it_pages_in(tmp_path: Path) -> None:
    """Beside two tensors that are stored as they are, one as no code makes it smaller, one of a layer that is not packed."""
    num_experts = 4
    experts = torch.randn((num_experts, len(PARTS), NUM_VALUES)).to(torch.bfloat16)
    noise = torch.randint(-(2**15), 2**15, (NUM_VALUES,)).to(torch.int16)
    experts[2, 1] = noise.view(torch.bfloat16)
    store = packed_store(tmp_path / "layer.packed", experts)
    plain = experts[3, 0].view(torch.uint8).numpy()
    store._parts[0, 3, PARTS[0]] = plain
    blocks = make_blocks(num_experts * FRAME_BYTES, store, as_stored=True, lock_pages=page_lock)
    tier = HostTier(blocks, num_layers=1, num_experts=num_experts, as_stored=True)
    for expert in reversed(range(num_experts)):
        block = tier.begin(Promotion(0, expert))
        assert block is not None
        tier.finish(block, store.read_stored(0, expert, blocks[block]))
    packed = new_packed_blocks(tier, store, "cuda")
    packed.stored.copy_(torch.from_numpy(where_stored(tier, store)))
    arena = torch.zeros(NUM_FRAMES * FRAME_BYTES, dtype=torch.uint8, device="cuda")
    block_of = torch.from_numpy(tier.block_table())[0].cuda()
    sources, frames = torch.zeros((2, num_experts), dtype=torch.int32, device="cuda")
    count = torch.zeros(1, dtype=torch.int32, device="cuda")

    def page_in() -> None:
        loads = {"sources": sources, "frames": frames, "count": count}
        host = torch.from_numpy(blocks)
        page_in_packed(host, arena, frame_bytes=FRAME_BYTES, its=packed, **loads)

    page_in()  # compiles, and moves nothing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        page_in()
    rows = arena.view(NUM_FRAMES, FRAME_BYTES)
    assert not rows.any()
    for num_loads in (1, 3, num_experts):
        rows.fill_(170)
        chosen = torch.randperm(num_experts, device="cuda")[:num_loads]
        places = torch.randperm(NUM_FRAMES, device="cuda")[:num_loads]
        sources[:num_loads], frames[:num_loads] = block_of[chosen], places.to(torch.int32)
        count.fill_(num_loads)
        graph.replay()
        for expert, frame in zip(chosen.tolist(), places.tolist(), strict=True):
            assert rows[frame].cpu().equal(experts[expert].view(-1).view(torch.uint8))
        others = torch.ones(NUM_FRAMES, dtype=torch.bool, device="cuda")
        others[places] = False
        assert rows[others].eq(170).all()


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
