"""Packed experts from blocks of host memory into frames, decoded: which and how many is data."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vast import last_bytes, vast_bytes

from sglmoe.kernels import reference
from sglmoe.kernels.exponent_codec.encode import encode
from sglmoe.kernels.exponent_codec.layout import TILE_VALUES, Form, read_layout
from sglmoe.kernels.exponent_codec.page_in_packed import (
    ESCAPES_AT_ONCE,
    NOT_CODED,
    TILES_AT_ONCE,
    PackedBlocks,
    page_in_packed,
)

KINDS = ("gaussian", "escapes", "noise", "plain")
GAP_BYTES = 32  # between tensors of a frame, and behind the last


class Model(NamedTuple):
    """Experts of tensors of these sizes, in frames and in blocks."""

    experts: list[list[torch.Tensor]]  # int16
    blocks: torch.Tensor
    packed: PackedBlocks
    frame_bytes: int

    def frame(self, expert: int) -> torch.Tensor:
        """What its frame is to be, where that was full of 170."""
        frame = torch.full((self.frame_bytes,), 170, dtype=torch.uint8)
        for (_, offset, num_bytes), its in zip(
            self.packed.parts.tolist(), self.experts[expert], strict=True
        ):
            frame[offset : offset + num_bytes] = its.view(torch.uint8)
        return frame


def values_of(kind: str, num_values: int, seed: int) -> torch.Tensor:
    """int16. Each tile has exponents of its own; `escapes`: half of a tile has a quarter of others."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        bits = torch.randint(-(2**15), 2**15, (num_values,), generator=generator)
        return bits.to(torch.int16)
    values = torch.randn(num_values, generator=generator)
    values *= 2.0 ** (7 * (torch.arange(num_values) // TILE_VALUES % 5))
    values = values.bfloat16().view(torch.int16)
    if kind == "escapes":
        tile = values[-TILE_VALUES // 2 :]
        some = torch.randperm(len(tile), generator=generator)[: len(tile) // 4]
        tile[some] = torch.randint(-127, 128, (len(some),), generator=generator).to(torch.int16)
    return values


def make_model(sizes: list[int], kinds: list[list[str]]) -> Model:
    """`sizes`: values of each tensor, multiples of 8; `kinds`: of each expert's tensors."""
    in_frame, offset = [], 0
    for size in sizes:
        in_frame.append((offset, 2 * size))
        offset += 2 * size + GAP_BYTES
    experts, stored, places = [], [], []
    for number, its_kinds in enumerate(kinds):
        its = [
            values_of(kind, size, 10 * number + index)
            for index, (kind, size) in enumerate(zip(its_kinds, sizes, strict=True))
        ]
        experts.append(its)
        pieces, rows, start = [], [], 0
        for kind, values in zip(its_kinds, its, strict=True):
            piece = values.view(torch.uint8) if kind == "plain" else encode(values)
            pieces.append(piece)
            rows.append(place(kind, piece, start))
            start += piece.numel()
        stored.append(torch.cat(pieces))
        places.append(rows)
    block_bytes = max(map(len, stored))
    blocks = torch.full((len(kinds), block_bytes), 85, dtype=torch.uint8)
    for block, its_bytes in zip(blocks, stored, strict=True):
        block[: len(its_bytes)] = its_bytes
    packed = PackedBlocks.empty(in_frame, len(kinds), "cpu")
    packed.stored.copy_(torch.tensor(places))
    return Model(experts, blocks, packed, offset)


def place(kind: str, piece: torch.Tensor, start: int) -> tuple[int, int]:
    if kind == "plain":
        return start, NOT_CODED
    its = read_layout(piece.numpy())
    return (start + its.tiles, NOT_CODED) if its.form is Form.RAW else (start, its.num_escapes)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def run(kernel: Any, model: Model, num_frames: int, **loads: Any) -> torch.Tensor:
    arena = torch.full((num_frames * model.frame_bytes,), 170, dtype=torch.uint8)
    where = {"frame_bytes": model.frame_bytes, "its": model.packed}
    kernel(model.blocks, arena, **where, **loads)
    return arena.view(num_frames, -1)


def test_the_first_count_experts_arrive_and_nothing_else_changes() -> None:
    """Tensors of one group of tiles and of two; tiles that are not full."""
    sizes = [TILE_VALUES * TILES_AT_ONCE + 8, 3 * TILE_VALUES - 16, 8]
    model = make_model(sizes, [["gaussian", "escapes", "plain"], ["noise", "plain", "gaussian"]])
    loads = {"sources": ints(1, 0, 0), "frames": ints(3, 0, 1), "count": ints(2)}
    frames = run(page_in_packed, model, 4, **loads, num_programs=3)
    assert torch.equal(frames[3], model.frame(1))
    assert torch.equal(frames[0], model.frame(0))
    assert frames[[1, 2]].eq(170).all()
    assert torch.equal(frames, run(reference.page_in_packed, model, 4, **loads))


def test_no_loads_move_nothing() -> None:
    model = make_model([TILE_VALUES], [["gaussian"]])
    loads = {"sources": ints(0), "frames": ints(0), "count": ints(0)}
    assert run(page_in_packed, model, 2, **loads).eq(170).all()


def test_more_escapes_than_are_put_at_once_in_every_tile_of_a_group() -> None:
    """And a number of them that no tile begins with."""
    num_values = TILES_AT_ONCE * TILE_VALUES
    values = values_of("gaussian", num_values, 0)
    for tile in range(TILES_AT_ONCE):
        first = tile * TILE_VALUES + 7 * tile
        values[first : first + ESCAPES_AT_ONCE + 10 + tile] = 0x7F81  # a NaN with a payload
    piece = encode(values)
    layout = read_layout(piece.numpy())
    assert layout.form is Form.CODED
    assert layout.num_escapes > TILES_AT_ONCE * ESCAPES_AT_ONCE
    packed = PackedBlocks.empty([(0, 2 * num_values)], 1, "cpu")
    packed.stored.copy_(torch.tensor([[[0, layout.num_escapes]]]))
    model = Model([[values]], piece.view(1, -1), packed, 2 * num_values)
    loads = {"sources": ints(0), "frames": ints(1), "count": ints(1)}
    assert torch.equal(run(page_in_packed, model, 2, **loads, num_programs=1)[1], model.frame(0))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_behind_the_last_block(kind: str) -> None:
    """Where no memory is; a group of tiles that is not full ends there."""
    model = make_model([TILE_VALUES * (TILES_AT_ONCE + 1) - 8], [[kind]])
    blocks = last_bytes(model.blocks.numel()).view(1, -1)
    blocks.copy_(model.blocks)
    loads = {"sources": ints(0), "frames": ints(0), "count": ints(1)}
    frames = run(page_in_packed, model._replace(blocks=blocks), 1, **loads, num_programs=2)
    assert torch.equal(frames[0], model.frame(0))


def test_offsets_have_64_bits() -> None:
    """A frame beyond 2^31 values of the arena, a block beyond 2^31 bytes of host memory."""
    model = make_model([TILE_VALUES + 8], [["gaussian"]])
    num_blocks = 2**32 // model.blocks.shape[1] + 2
    blocks = vast_bytes(num_blocks * model.blocks.shape[1]).view(num_blocks, -1)
    blocks[-1] = model.blocks[0]
    packed = PackedBlocks.empty([(0, 2 * TILE_VALUES + 16)], num_blocks, "cpu")
    packed.stored[-1] = model.packed.stored[0]
    num_frames = 2**33 // model.frame_bytes + 2
    arena = vast_bytes(num_frames * model.frame_bytes)
    page_in_packed(
        blocks,
        arena,
        frame_bytes=model.frame_bytes,
        its=packed,
        sources=ints(num_blocks - 1),
        frames=ints(num_frames - 1),
        count=ints(1),
        num_programs=2,
    )
    its = arena[-model.frame_bytes : -GAP_BYTES]
    assert torch.equal(its, model.frame(0)[:-GAP_BYTES])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_loads_move_as_the_reference_does(data: st.DataObject) -> None:
    sizes = data.draw(
        st.lists(
            st.sampled_from([8, 2040, 2048, 2056, 3 * 2048, 4 * 2048, 5 * 2048 + 128]),
            min_size=1,
            max_size=5,
        )
    )
    num_experts, num_frames = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    kinds = [[data.draw(st.sampled_from(KINDS)) for _ in sizes] for _ in range(num_experts)]
    model = make_model(sizes, kinds)
    sources = data.draw(
        st.lists(st.integers(0, num_experts - 1), min_size=num_frames, max_size=num_frames)
    )
    frames = data.draw(st.permutations(range(num_frames)))
    count = data.draw(st.integers(0, num_frames))
    loads = {"sources": ints(*sources), "frames": ints(*frames), "count": ints(count)}
    num_programs = data.draw(st.sampled_from([1, 3, 16]))
    moved = run(page_in_packed, model, num_frames, **loads, num_programs=num_programs)
    assert torch.equal(moved, run(reference.page_in_packed, model, num_frames, **loads))
    for source, frame in zip(sources[:count], frames[:count], strict=True):
        assert torch.equal(moved[frame], model.frame(source))
    assert moved[np.array(frames[count:], int)].eq(170).all()
