"""Tensors of GPTQ and AWQ checkpoints, and what they are in a frame: the bits that SGLang's `MoeWNA16Method` makes of them.

Both have a matrix `[n, k]` as `[k, n]`, in int32 of eight weights each, the lowest bits first: GPTQ has eight rows of a column
in one, AWQ eight columns of a row, of which the first, third, fifth and seventh lie in its lower half. In a frame it is
`[n, k / 2]` bytes. numpy, because threads convert that must not start others, as torch would.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, assert_never

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.memory.expert_layout import W4A16, BlockFp8, ExpertFormat, FrameTensor, Plain
from sglmoe.memory.mapped_files import Extent

Bytes = npt.NDArray[np.uint8]
Convert = Callable[[Bytes], Bytes]

PER_WORD = 8  # weights of 4 bits in an int32
# Arbitrary: of a matrix of 4096 rows of words as wide, a block fits a core's second-level cache.
BLOCK_COLUMNS = 64
LOW_HALVES = np.uint32(0x0F0F0F0F)
# Columns of an AWQ word in the order in which their bits lie, from the lowest on: AutoAWQ's AWQ_ORDER.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


class Converted(msgspec.Struct, frozen=True, gc=False):
    """A tensor that a checkpoint has in another form than a frame."""

    source: Bytes | Extent
    nbytes: int  # in a frame
    convert: Convert  # of all of the source to all of the frame's


class CheckpointForm(msgspec.Struct, frozen=True):
    """What a checkpoint has in the place of a part of a frame's tensor."""

    shape: tuple[int, int]
    dtype: str | None  # torch's name; None for any number that can be cast to the frame's
    convert: Convert | None  # None where the two are the same


@cache
def checkpoint_form(its: ExpertFormat, tensor: FrameTensor, dtype: str) -> CheckpointForm:
    """For each part of `tensor`, which is one of a layout of `its`. `dtype`: what the checkpoint's tensor has, torch's name."""
    rows, columns = tensor.part_shape
    match its:
        case Plain() | BlockFp8():
            return CheckpointForm((rows, columns), None, None)
        case W4A16(source=source):
            what = tensor.name.partition("_")[2]
            if what == "scales":
                convert = partial(scales, width=rows, dtype=dtype, to=tensor.dtype)
                return CheckpointForm((columns, rows), None, convert)
            of_source = {"gptq": (gptq_weights, gptq_zeros), "awq": (awq_weights, awq_zeros)}
            weights, zeros = of_source[source]
            if what == "qzeros":
                width = 2 * rows
                return CheckpointForm(
                    (columns, width // PER_WORD), "int32", partial(zeros, width=width)
                )
            depth = 2 * columns
            shape = (depth // PER_WORD, rows) if source == "gptq" else (depth, rows // PER_WORD)
            return CheckpointForm(shape, "int32", partial(weights, width=rows))
        case _:
            assert_never(its)


def gptq_weights(raw: Bytes, *, width: int) -> Bytes:
    """int32 `[k / 8, width]` to uint8 `[width, k / 2]`: eight weights of a row lie in a word as they lie in four bytes."""
    return _flat(_turned(raw.view(np.uint32).reshape(-1, width)))


def awq_weights(raw: Bytes, *, width: int) -> Bytes:
    """int32 `[k, width / 8]` to uint8 `[width, k / 2]`."""
    words = raw.view(np.uint32).reshape(-1, 2, width // PER_WORD)
    even, odd = (_turned(words[:, which]) for which in (0, 1))  # of k
    low = (even & LOW_HALVES) | ((odd & LOW_HALVES) << 4)
    high = ((even >> 4) & LOW_HALVES) | (odd & ~LOW_HALVES)
    pairs = np.empty((width // PER_WORD, PER_WORD, len(words)), np.uint8)
    for start, its in enumerate((low, high)):  # every second four bits of a word
        pieces = its.view(np.uint8).reshape(*its.shape, 4)
        for place, column in enumerate(AWQ_COLUMNS[start::2]):
            pairs[:, column] = pieces[..., place]
    return _flat(pairs)


def gptq_zeros(raw: Bytes, *, width: int) -> Bytes:
    """int32 `[groups, width / 8]` to uint8 `[width / 2, groups]`. A checkpoint has each less by one.

    One that is 15 there overflows into its neighbour, as in SGLang's loader: no zero point is 16.
    """
    return _flat((raw + np.uint8(0x11)).reshape(-1, width // 2).T)


def awq_zeros(raw: Bytes, *, width: int) -> Bytes:
    """int32 `[groups, width / 8]` to uint8 `[width / 2, groups]`."""
    words = raw.view(np.uint32).reshape(-1, width // PER_WORD, 1)
    shifts = np.arange(0, 16, 4, dtype=np.uint32)
    pairs = ((words >> shifts) & 15) | (((words >> (shifts + 16)) & 15) << 4)
    return _flat(pairs.astype(np.uint8).reshape(-1, width // 2).T)


def scales(raw: Bytes, *, width: int, dtype: str, to: str) -> Bytes:
    """`[groups, width]` to `[width, groups]`, rounded to the type that the kernel reads, to nearest and even."""
    if dtype == to:
        return _flat(raw.view(f"u{4 if dtype == 'float32' else 2}").reshape(-1, width).T)
    values = _to_float32(raw, dtype).reshape(-1, width).T
    if to == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return _flat(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))
    with np.errstate(over="ignore"):  # becomes infinite, as it does to torch
        return _flat(values.astype(to))


def _to_float32(raw: Bytes, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32)


def _turned(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The transpose, in its own order. Through blocks of neighbours: rows a power of two apart would share a cache's lines."""
    depth, width = words.shape
    turned = np.empty((width, depth), np.uint32)
    for start in range(0, width, BLOCK_COLUMNS):
        stop = start + BLOCK_COLUMNS
        turned[start:stop] = np.ascontiguousarray(words[:, start:stop]).T
    return turned


def _flat(array: npt.NDArray[Any]) -> Bytes:
    """Its elements in its own order: uint8, one-dimensional."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
