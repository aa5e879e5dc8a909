"""How a token's KV lies in the arena: SGLang's own pool, whose tensors become views of it.

One of the files that know sglang.
"""

import math
from typing import Any

import msgspec
import torch

from sglmoe.config import EngineConfig
from sglmoe.decode_graphs import DecodeGraphs, has_padding
from sglmoe.errors import models
from sglmoe.memory.arena import Geometry, plan_geometry
from sglmoe.worker.moe_layer import PagedExperts


class KvLayout(msgspec.Struct, frozen=True):
    """How a token's KV lies in the arena: one row a layer for MLA, a row of K and a row of V a layer otherwise."""

    pool: Any  # sglang's KV pool, whose per-layer tensors become views of the arena
    layers: tuple[tuple[torch.Tensor, ...], ...]  # the stock buffers of each layer
    row_shape: tuple[int, ...]

    @classmethod
    def of(cls, pool: Any) -> "KvLayout":
        """Read the layout off a stock pool. Raises ValueError for pools that are neither MHA nor MLA."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

        if type(pool) is MLATokenToKVPool:
            layers: tuple[tuple[torch.Tensor, ...], ...] = tuple((b,) for b in pool.kv_buffer)
        elif type(pool) is MHATokenToKVPool:
            layers = tuple(zip(pool.k_buffer, pool.v_buffer, strict=True))
        else:
            raise models.unknown_kv(kind=type(pool).__name__)
        shapes = {tuple(buffer.shape[1:]) for buffers in layers for buffer in buffers}
        if len(shapes) != 1:
            raise models.uneven_kv(shapes=str(shapes))
        return cls(pool=pool, layers=layers, row_shape=shapes.pop())

    @property
    def token_rows(self) -> int:
        return sum(len(buffers) for buffers in self.layers)

    @property
    def token_bytes(self) -> int:
        buffer = self.layers[0][0]
        return self.token_rows * math.prod(self.row_shape) * int(buffer.element_size())

    def geometry(
        self, arena_bytes: int, experts: PagedExperts, config: EngineConfig, graphs: DecodeGraphs
    ) -> Geometry:
        """Of an arena for such tokens and these experts; see `plan_geometry`."""
        return plan_geometry(
            arena_bytes=arena_bytes,
            expert_bytes=experts.layout.num_bytes if experts.layout else 0,
            token_bytes=self.token_bytes,
            token_rows=self.token_rows,
            page_tokens=config.page_tokens,
            has_padding=has_padding(graphs, on_gpu=self.layers[0][0].is_cuda),
        )

    def move_to(self, arena: torch.Tensor, page_tokens: int) -> None:
        """Make the pool's tensors views of the arena (`uint8`), so that a token's id is its row (`Geometry`)."""
        rows = arena.view(self.layers[0][0].dtype).view(-1, *self.row_shape)
        views = [rows[index * page_tokens :] for index in range(self.token_rows)]
        if len(self.layers[0]) == 1:
            self.pool.kv_buffer = views
        else:
            self.pool.k_buffer, self.pool.v_buffer = views[0::2], views[1::2]
        # Kernels that store KV stop the device at an id from size + page_size on.
        self.pool.size = len(views[-1]) - self.pool.page_size
