"""Frames of the arena seen as experts: nothing is copied, and the first stride of every tensor is a frame."""

from typing import assert_never

import torch

from sglmoe.kernels import block_fp8, int4
from sglmoe.memory.arena import Geometry
from sglmoe.memory.expert_layout import W4A16, BlockFp8, ExpertFormat, ExpertLayout, Plain


class FrameViews:
    """The tensors of the expert in each frame, by name: `[num_frames, rows, columns]`."""

    def __init__(
        self, arena: torch.Tensor, geometry: Geometry, layout: ExpertLayout, its: ExpertFormat
    ):
        """`arena`: its frames, uint8 `[num_frames * frame_bytes]`; `its`: the format that `layout` is of."""
        self.format = its
        self.tensors: dict[str, torch.Tensor] = {}
        for tensor in layout.tensors:
            flat = arena.view(getattr(torch, tensor.dtype))
            stride = geometry.frame_bytes // flat.itemsize
            self.tensors[tensor.name] = flat.as_strided(
                (geometry.num_frames, *tensor.shape),
                (stride, tensor.shape[1], 1),
                storage_offset=flat.storage_offset() + tensor.offset // flat.itemsize,
            )

    def matrices(self, frame: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 and w2 of the expert in a frame, as they are multiplied with activations of `dtype`."""
        return self._matrix("w13", frame, dtype), self._matrix("w2", frame, dtype)

    def _matrix(self, name: str, frame: int, dtype: torch.dtype) -> torch.Tensor:
        def tensor(what: str) -> torch.Tensor:
            return self.tensors[f"{name}_{what}"][frame]

        match self.format:
            case Plain():
                return tensor("weight")
            case BlockFp8(rows, columns):
                weight, scale = tensor("weight"), tensor("weight_scale_inv")
                return block_fp8.dequantise(weight, scale, rows=rows, columns=columns, dtype=dtype)
            case W4A16(group=group, has_zeros=has_zeros):
                zero = tensor("qzeros") if has_zeros else None
                weight, scale = tensor("qweight"), tensor("scales")
                return int4.dequantise(weight, scale, zero, group=group, dtype=dtype)
            case _:
                assert_never(self.format)
