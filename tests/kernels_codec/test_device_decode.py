"""Packed experts from a file to the frames of a device, through the real kernel, interpreted."""

import os
from pathlib import Path

import numpy as np
import torch
import xxhash

from sglmoe.kernels.exponent_codec.encode import encode
from sglmoe.memory.arena import Frames
from sglmoe.memory.device_decode import DecodedFrames, staged_bytes
from sglmoe.memory.experts import Load
from sglmoe.memory.mapped_files import Extent
from sglmoe.memory.packed_extent import PackedExtent
from sglmoe.memory.packed_slabs import PackedSlabs
from sglmoe.memory.store import PARTS, ExpertStore

NUM_VALUES = 4 * 2048 - 512  # the last tile is not full
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


def test_cells_of_the_arena_are_filled_and_decoded_wherever_their_bytes_are(tmp_path: Path) -> None:
    """Four experts packed in frames 6, 1, 4 and 2, three of them in two frames that are no neighbours."""
    generator = torch.Generator().manual_seed(1)
    experts = torch.randn((4, len(PARTS), NUM_VALUES), generator=generator).to(torch.bfloat16)
    experts[3, 1] = torch.arange(NUM_VALUES).to(torch.int16).view(torch.bfloat16)  # stored raw
    store = packed_store(tmp_path, experts)
    frames, cell_bytes = Frames(8), staged_bytes(store)
    slabs = PackedSlabs(frames, (1, 4), frame_bytes=FRAME_BYTES, cell_bytes=cell_bytes)
    take(frames, slabs, [6, 1, 4, 2])
    slabs.hold([(0, expert) for expert in range(4)])
    arena = torch.full((8, FRAME_BYTES), 170, dtype=torch.uint8)
    decoded = DecodedFrames(arena, store, num_staged=2)
    block = np.zeros(store.stored_expert_bytes(), np.uint8)
    for expert, frame in enumerate((0, 3, 5, 7)):
        cell = slabs.begin(0, expert)
        store.read_stored(0, expert, block)
        copy = torch.from_numpy(block).clone()
        decoded.place(Load(frame, 0, expert, cell), block.nbytes).copy_(copy)
    decoded.flush()
    for expert in range(4):
        slabs.end(0, expert, is_there=True)
    assert_in_frames(arena, experts, (0, 3, 5, 7))
    arena[[0, 3, 5, 7]] = 170
    for expert, frame in enumerate((7, 5, 3, 0)):  # all in one round, from the arena alone
        cell = slabs.begin(0, expert)
        assert cell is not None
        assert (cell.is_filled, len(cell.runs)) == (True, 1 if expert == 0 else 2)
        decoded.unpack(Load(frame, 0, expert, cell))
    decoded.flush()
    assert_in_frames(arena, experts, (7, 5, 3, 0))


def take(frames: Frames, slabs: PackedSlabs, wanted: list[int]) -> None:
    """Frames for packed experts, in this order."""
    taken = [frames.take_for_kv() for _ in range(len(frames))]
    for frame in wanted:
        frames.give(frame)
        slabs.grow()
    for frame in set(taken) - set(wanted):
        frames.give(frame)
    assert slabs.held_frames() == wanted


def assert_in_frames(arena: torch.Tensor, experts: torch.Tensor, where: tuple[int, ...]) -> None:
    for expert, frame in enumerate(where):
        assert arena[frame, :EXPERT_BYTES].equal(experts[expert].view(-1).view(torch.uint8))
        assert arena[frame, EXPERT_BYTES:].eq(170).all()
