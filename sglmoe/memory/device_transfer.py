"""Moves experts' bytes from the host into frames of an arena on a CUDA device.

Copies are queued on the current stream, in front of the kernels that need them and behind those that read the frame's last
tenant. Experts that fit into the host budget are kept in page-locked memory, one exact-size contiguous block each; the
others pass through two page-locked staging blocks.
"""

from collections.abc import Sequence

import numpy as np
import torch

from sglmoe.memory.experts import Load
from sglmoe.memory.store import ExpertStore
from sglmoe.units import show_bytes


class PinnedBlocks:
    """`num_blocks` page-locked blocks of `block_bytes`, locked in place: no rounding to powers of two."""

    def __init__(self, num_blocks: int, block_bytes: int):
        self.blocks = torch.from_numpy(np.empty((num_blocks, block_bytes), dtype=np.uint8))
        if num_blocks:
            error = torch.cuda.cudart().cudaHostRegister(
                self.blocks.data_ptr(), self.blocks.nbytes, 0
            )
            if int(error) != 0:
                raise ValueError(
                    f"CUDA can't page-lock {show_bytes(self.blocks.nbytes)} of host memory ({error}); "
                    "lower --host-memory"
                )


class DeviceCopier:
    """`arena` is uint8 ``[num_frames * frame_bytes]`` on the device; `host_bytes` may be page-locked for experts."""

    def __init__(
        self, arena: torch.Tensor, *, frame_bytes: int, store: ExpertStore, host_bytes: int
    ):
        self._frames = arena.view(-1, frame_bytes)
        self._store = store
        self._expert_bytes = store.expert_bytes()
        self._pinned: dict[tuple[int, int], torch.Tensor] = {}
        self._staging = PinnedBlocks(2, self._expert_bytes).blocks
        self._staging_free = [torch.cuda.Event(), torch.cuda.Event()]
        self._next_staging = 0
        self._pin(host_bytes)

    def load(self, loads: Sequence[Load]) -> None:
        """Queue the copies; the frames may be used by whatever is queued on this stream after that."""
        for load in loads:
            block = self._pinned.get((load.layer, load.expert))
            target = self._frames[load.frame, : self._expert_bytes]
            if block is not None:
                target.copy_(block, non_blocking=True)
            else:
                self._stage(load, target)

    def _pin(self, host_bytes: int) -> None:
        experts = self._store.experts()[: host_bytes // max(1, self._expert_bytes)]
        blocks = PinnedBlocks(len(experts), self._expert_bytes).blocks
        for (layer, expert), block in zip(experts, blocks, strict=True):
            self._store.read(layer, expert, block.numpy())
            self._pinned[layer, expert] = block

    def _stage(self, load: Load, target: torch.Tensor) -> None:
        """Read into the staging block that was queued longer ago, once its copy is done."""
        index, self._next_staging = self._next_staging, 1 - self._next_staging
        block, free = self._staging[index], self._staging_free[index]
        free.synchronize()
        self._store.read(load.layer, load.expert, block.numpy())
        target.copy_(block, non_blocking=True)
        free.record()
