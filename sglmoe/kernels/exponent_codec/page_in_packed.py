"""Brings packed experts from page-locked host memory into frames, decoded on the way, with every index on the device.

As `page_in` does plain ones: the device reads host memory over the link itself, which experts and how many is known only there,
and a captured graph moves what each replay has decided. No GPU has run it.
"""

from collections.abc import Sequence

import msgspec
import torch
import triton
import triton.language as tl

from sglmoe.kernels.exponent_codec import layout
from sglmoe.kernels.exponent_codec.tiles import (
    HEADER_BYTES,
    TILE_BYTES,
    TILE_VALUES,
    aligned,
    decode_codes,
)
from sglmoe.units import ceil_div

# What is asked of an expert's tensors and of frames: they begin and end at a multiple of so many bytes.
VECTOR_BYTES = layout.ALIGN_BYTES
NOT_CODED = -1  # in the place of a number of escapes: the bytes are the values
# A link moves 32 bytes for whoever asks for one. So a program takes so many tiles of a tensor at a time: where their escapes
# begin, their bases, and all their escapes are then a few reads of neighbours, where each tile would have several of its own.
TILES_AT_ONCE = 4
# For those of such tiles of Gaussian weights, 100, once is enough.
ESCAPES_AT_ONCE = 128
# One warp: each thread has eight of a row's 256 bytes, so a warp asks for two whole lines (tensors end where one does, see
# `memory/staging.py`), and no number that all need is read more than once. A program asks for a tile, 2816 bytes, decodes it,
# asks for the next, and for escapes at the end; what fills the link is that many do. PCIe 5.0 moves 110 KB in 2 us, so 40 would
# do if none ever decoded. These are four for each multiprocessor of a large GPU, one for each of its schedulers, and a quarter
# of the threads of `page_in`.
NUM_WARPS = 1
NUM_PROGRAMS = 512

LANES = tl.constexpr(triton.next_power_of_2(TILES_AT_ONCE + 1))


class PackedBlocks(msgspec.Struct, frozen=True, eq=False):
    """Where the P tensors of experts lie, in bytes, int32, at addresses that never change."""

    # [P, 3]: groups of tiles of an expert before the tensor's, where it begins in a frame, its size there
    parts: torch.Tensor
    # [num_blocks, P, 2]: where it begins in its block, and the number of its escapes; NOT_CODED: plain bytes begin there
    stored: torch.Tensor
    num_groups: int  # of an expert

    @classmethod
    def empty(
        cls, in_frame: Sequence[tuple[int, int]], num_blocks: int, device: str
    ) -> "PackedBlocks":
        """`in_frame`: where each tensor begins in a frame, and its size, multiples of 16. Nothing is said of blocks yet."""
        rows, num_groups = [], 0
        for offset, num_bytes in in_frame:
            assert offset % VECTOR_BYTES == num_bytes % VECTOR_BYTES == 0
            rows.append((num_groups, offset, num_bytes))
            num_groups += ceil_div(num_bytes, layout.VALUE_BYTES * TILES_AT_ONCE * TILE_VALUES)
        return cls(
            torch.tensor(rows, dtype=torch.int32, device=device),
            torch.zeros((num_blocks, len(rows), 2), dtype=torch.int32, device=device),
            num_groups,
        )


def page_in_packed(
    blocks: torch.Tensor,
    arena: torch.Tensor,
    *,
    frame_bytes: int,
    its: PackedBlocks,
    sources: torch.Tensor,
    frames: torch.Tensor,
    count: torch.Tensor,
    num_programs: int = NUM_PROGRAMS,
) -> None:
    """As `page_in`, with blocks that hold experts as they are stored, checked when they were read: what they say is believed.

    `blocks`: uint8 `[num_blocks, block_bytes]`; block and frame are multiples of 16 bytes. What lies in a frame between tensors
    stays. May be captured.
    """
    block_bytes = blocks.shape[1]
    assert block_bytes % VECTOR_BYTES == 0
    assert frame_bytes % VECTOR_BYTES == 0
    assert blocks.is_contiguous()
    page_in_packed_kernel[(num_programs,)](
        blocks,
        arena.view(torch.int16),
        sources,
        frames,
        count,
        its.parts,
        its.stored,
        block_bytes // VECTOR_BYTES,
        frame_bytes // VECTOR_BYTES,
        its.num_groups,
        len(its.parts),
        PARTS=triton.next_power_of_2(len(its.parts)),
        GROUP=TILES_AT_ONCE,
        ESCAPES=ESCAPES_AT_ONCE,
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize=["block_vectors", "frame_vectors", "num_groups", "num_parts"])
def page_in_packed_kernel(
    blocks,
    arena,
    sources,
    frames,
    count,
    parts,
    stored,
    block_vectors,
    frame_vectors,
    num_groups,
    num_parts,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    ESCAPES: tl.constexpr,
):
    """Programs share the groups of tiles of all loads evenly. Values are int16; offsets of blocks and frames have 64 bits."""
    total = tl.load(count) * num_groups
    for index in range(tl.program_id(0), total, tl.num_programs(0)):
        load = index // num_groups
        group = index - load * num_groups
        some = tl.arange(0, PARTS)
        first_groups = tl.load(parts + 3 * some, mask=some < num_parts, other=num_groups)
        part = tl.sum((first_groups <= group).to(tl.int32), axis=0) - 1
        tile = (group - tl.load(parts + 3 * part)) * GROUP
        offset = tl.load(parts + 3 * part + 1) // 16 * 8
        num_values = tl.load(parts + 3 * part + 2) // 16 * 8
        source = tl.load(sources + load).to(tl.int64)
        frame = tl.load(frames + load).to(tl.int64)
        where = stored + (source * num_parts + part) * 2
        start, num_escapes = tl.load(where) // 16 * 16, tl.load(where + 1)
        tensor = blocks + source * block_vectors * 16 + start
        values = arena + frame * frame_vectors * 8 + offset + tile * TILE_VALUES
        if num_escapes < 0:
            raw = tensor + 2 * tile * TILE_VALUES
            _copy_group(raw, values, num_values - tile * TILE_VALUES, GROUP)
        else:
            _decode_group(tensor, tile, values, num_values, num_escapes, GROUP, ESCAPES)


@triton.jit
def _copy_group(raw, values, num_left, GROUP: tl.constexpr):
    raw = raw.to(tl.pointer_type(tl.int16))
    for index in range(GROUP):
        place = index * TILE_VALUES + tl.arange(0, TILE_VALUES)
        exists = place < num_left
        tl.store(values + place, tl.load(raw + place, mask=exists), mask=exists)


@triton.jit
def _decode_group(
    tensor,
    tile,
    values,
    num_values,
    num_escapes,
    GROUP: tl.constexpr,
    ESCAPES: tl.constexpr,
):
    """The tiles from `tile` on, whose values begin at `values`. See `layout`."""
    num_tiles = tl.cdiv(num_values, TILE_VALUES)
    first_escape = tensor + HEADER_BYTES
    base = first_escape + aligned(4 * (num_tiles + 1))
    position = base + aligned(num_tiles)
    exponent = position + aligned(2 * num_escapes)
    bytes_of_tiles = exponent + aligned(num_escapes) + tile * TILE_BYTES
    # Of each tile of the group, and of the one behind it; those behind the last have no escapes.
    lane = tl.arange(0, LANES)
    first_escape = first_escape.to(tl.pointer_type(tl.int32)) + tl.minimum(tile + lane, num_tiles)
    first = tl.load(first_escape, mask=lane <= GROUP, other=0)
    bases = tl.load(base + tile + lane, mask=(lane < GROUP) & (tile + lane < num_tiles), other=0)
    num_left = num_values - tile * TILE_VALUES
    for index in range(tl.minimum(GROUP, num_tiles - tile)):
        decode_codes(
            bytes_of_tiles + index * TILE_BYTES,
            _pick(bases.to(tl.int32), index),
            values + index * TILE_VALUES,
            num_left - index * TILE_VALUES,
        )
    tl.debug_barrier()  # an escape replaces what another thread has just written
    stop = _pick(first, GROUP)
    for begin in range(_pick(first, 0), stop, ESCAPES):
        escape = begin + tl.arange(0, ESCAPES)
        _put_escapes(position, exponent, escape, stop, first, values, GROUP)


@triton.jit
def _put_escapes(position, exponent, escape, stop, first, values, GROUP: tl.constexpr):
    exists = escape < stop
    place = tl.load(position.to(tl.pointer_type(tl.uint16)) + escape, mask=exists, other=0)
    place = place.to(tl.int32)
    for tile in tl.static_range(1, GROUP):
        place += tl.where(escape >= _pick(first, tile), TILE_VALUES, 0)
    exponents = tl.load(exponent + escape, mask=exists, other=0).to(tl.int32)
    # Sign and mantissa are in the frame by now, which is the device's own memory; the link need not bring them again.
    value = tl.load(values + place, mask=exists, other=0).to(tl.int32)
    value = (value & ~0x7F80) | (exponents << 7)
    tl.store(values + place, value.to(tl.int16), mask=exists)


@triton.jit
def _pick(numbers, index):
    """One of LANES numbers that the threads have among them."""
    return tl.sum(tl.where(tl.arange(0, LANES) == index, numbers, 0), axis=0)
