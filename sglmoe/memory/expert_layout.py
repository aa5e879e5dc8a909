"""What an expert is made of, as data: its tensors, their types and sizes, and where they lie in a frame.

Knows formats of weights, by their published names. Neither torch nor the checkpoint: plans ask it for bytes too.
"""

import math
from typing import Literal, assert_never

import msgspec

from sglmoe.units import ceil_div

# Triton compiles a kernel for addresses that 16 divides, which those of stock weights are.
ALIGN_BYTES = 16
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "uint8": 1}


class Plain(msgspec.Struct, frozen=True):
    """Weights as they are multiplied."""

    dtype: str  # torch's name


class BlockFp8(msgspec.Struct, frozen=True):
    """Weights in float8_e4m3fn, and a float32 for each block of so many rows and columns, which its weights are multiplied
    by: DeepSeek-V3 (arXiv 2412.19437, section 3.3.2), `weight_block_size` in a config."""

    rows: int
    columns: int


class W4A16(msgspec.Struct, frozen=True):
    """Weights in 4 bits, two columns to a byte and the even one in its lower half, and a scale for each `group` of a row: what
    a weight stands for is its scale times the difference to its zero, which is 8, or where `has_zeros` a number of its group's,
    two rows to a byte. So SGLang's Triton kernel has the weights of GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978)."""

    dtype: str  # of scales, torch's name
    group: int
    has_zeros: bool
    source: Literal["gptq", "awq"]  # whose form they have in the checkpoint


ExpertFormat = Plain | BlockFp8 | W4A16


class FrameTensor(msgspec.Struct, frozen=True):
    """A tensor of an expert as kernels read it, row by row: what the checkpoint has of it, one behind the other."""

    name: str  # of SGLang's parameter
    dtype: str  # torch's name
    shape: tuple[int, int]
    offset: int  # in the frame, in bytes
    parts: tuple[str, ...]  # in the checkpoint: equal slices of its rows

    @property
    def part_shape(self) -> tuple[int, int]:
        return self.shape[0] // len(self.parts), self.shape[1]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def part_bytes(self) -> int:
        return self.num_bytes // len(self.parts)


class ExpertLayout(msgspec.Struct, frozen=True):
    """All tensors of an expert, in the order in which they lie in a frame."""

    tensors: tuple[FrameTensor, ...]

    @property
    def num_bytes(self) -> int:
        """From the start of the frame to the end of the last."""
        last = self.tensors[-1]
        return last.offset + last.num_bytes

    def tensor_of(self, part: str) -> FrameTensor:
        """The tensor that has this part of the checkpoint."""
        return next(tensor for tensor in self.tensors if part in tensor.parts)

    def part_offsets(self) -> dict[str, int]:
        """Where each part of the checkpoint begins in a frame, in bytes, ascending."""
        return {
            part: tensor.offset + index * tensor.part_bytes
            for tensor in self.tensors
            for index, part in enumerate(tensor.parts)
        }


def plan_layout(its: ExpertFormat, *, hidden: int, inner: int) -> ExpertLayout:
    """`w13` is `[2 * inner, hidden]`, the rows of w1 (gate), then those of w3 (up); `w2` (down) is `[hidden, inner]`. What
    is kept of these for blocks of rows and columns has a row and a column for each block; none may belong to both gate and up.
    """
    tensors: list[FrameTensor] = []
    end = 0
    for what, dtype, rows, columns in _kinds(its):
        assert inner % rows == 0, f"blocks of {rows} rows in gates of {inner}"
        for matrix, parts, shape in (
            ("w13", ("w1", "w3"), (2 * inner, hidden)),
            ("w2", ("w2",), (hidden, inner)),
        ):
            tensor = FrameTensor(
                name=f"{matrix}_{what}",
                dtype=dtype,
                shape=(ceil_div(shape[0], rows), ceil_div(shape[1], columns)),
                offset=ceil_div(end, ALIGN_BYTES) * ALIGN_BYTES,
                parts=tuple(part_name(part, what) for part in parts),
            )
            tensors.append(tensor)
            end = tensor.offset + tensor.num_bytes
    return ExpertLayout(tuple(tensors))


def _kinds(its: ExpertFormat) -> tuple[tuple[str, str, int, int], ...]:
    """Of each of the two matrices: name and type, and how many rows and columns one number stands for."""
    match its:
        case Plain(dtype):
            return (("weight", dtype, 1, 1),)
        case BlockFp8(rows, columns):
            scales = ("weight_scale_inv", "float32", rows, columns)
            return (("weight", "float8_e4m3fn", 1, 1), scales)
        case W4A16(dtype, group, has_zeros):
            packed = ("qweight", "uint8", 1, 2), ("scales", dtype, 1, group)
            return (*packed, ("qzeros", "uint8", 2, group)) if has_zeros else packed
        case _:
            assert_never(its)


def part_name(matrix: str, what: str) -> str:
    """What a part is called: `w1` of weights, `w1_weight_scale_inv` of others. `matrix` is SGLang's shard id."""
    return matrix if what == "weight" else f"{matrix}_{what}"
