"""Decode steps that are one CUDA graph each: memory lends every layer a set of frames, the device pages within it.

Before a step the host uploads who is where and what may be replaced; the captured layers make residents of what their routers
choose, without it (`kernels/residency.py`); behind the step the host reads back what became of the sets. Which steps can run so
is known before they do: every layer has a frame for each expert that it might need, and host memory has all experts. No GPU has
run this.
"""

from collections.abc import Generator
from contextlib import contextmanager
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sglmoe.errors.budgets import (
    full_graphs_need_all_experts,
    full_graphs_need_plain_experts,
    full_graphs_need_whole_vectors,
)
from sglmoe.kernels import residency
from sglmoe.kernels.page_in import VECTOR_BYTES, page_in
from sglmoe.kernels.residency import DeviceResidency, PageIns
from sglmoe.memory.frame_sets import USED, FrameSets
from sglmoe.memory.host_tier import HostTier
from sglmoe.memory.manager import MemoryManager
from sglmoe.worker.moe_layer import PagedExperts
from sglmoe.worker.routed import Routed

Ints = npt.NDArray[np.int32]


class LayerKernels(Protocol):
    """What a captured layer does on the device."""

    def decide(
        self, topk_ids: torch.Tensor, layer: int, *, state: DeviceResidency, page_ins: PageIns
    ) -> None:
        """See `residency.decide`."""

    def page_in(self, page_ins: PageIns) -> None:
        """Copy these blocks of host memory into these frames."""

    def forward(
        self, routing: Routed, weights: torch.Tensor, *, frame_table: torch.Tensor, config: Any
    ) -> torch.Tensor:
        """The layer's output, `[rows, hidden]`, by the frame of each expert: int32 `[experts]`. Rows whose ids are
        negative may have any."""


class TritonKernels:
    """Ours, and SGLang's between them. `blocks`: the host's, page-locked, uint8 `[num_blocks, expert_bytes]`; `arena`: its
    frames."""

    decide = staticmethod(residency.decide)

    def __init__(
        self, blocks: torch.Tensor, arena: torch.Tensor, *, frame_bytes: int, experts: PagedExperts
    ):
        assert experts.grouped is not None  # on CUDA
        self._blocks = blocks
        self._arena = arena
        self._frame_bytes = frame_bytes
        self._grouped = experts.grouped

    def page_in(self, page_ins: PageIns) -> None:
        page_in(
            self._blocks,
            self._arena,
            frame_bytes=self._frame_bytes,
            sources=page_ins.sources,
            frames=page_ins.frames,
            count=page_ins.count,
        )

    def forward(
        self, routing: Routed, weights: torch.Tensor, *, frame_table: torch.Tensor, config: Any
    ) -> torch.Tensor:
        hidden, ids = routing.hidden, routing.ids
        return self._grouped.forward_by_table(
            hidden, weights, ids, frame_table=frame_table, config=config
        )


class Sizes(NamedTuple):
    """Of the model, and of the largest captured step."""

    num_layers: int  # with experts
    num_experts: int
    top_k: int
    max_rows: int


class StepState:
    """What host and device tell each other of a step: int32, uploaded as a whole, of which the last parts are read back."""

    def __init__(self, its: Sizes, device: str):
        of_experts = (its.num_layers, its.num_experts)
        shapes = {
            "num_rows": (1,),
            "frame_table": of_experts,
            "set_sizes": of_experts[:1],
            "set_frames": of_experts,
            "set_owners": of_experts,
            "set_keys": of_experts,
            "shortfall": (1,),
        }
        stops = dict(zip(shapes, accumulate(map(prod, shapes.values())), strict=True))
        is_pinned = device != "cpu"
        self._sent = torch.zeros(stops["shortfall"], dtype=torch.int32, pin_memory=is_pinned)
        self._device = torch.zeros_like(self._sent, device=device)
        self._read_from = stops["set_frames"]
        self._came = torch.zeros_like(self._sent[self._read_from :], pin_memory=is_pinned)

        def cut(flat: torch.Tensor, name: str, start: int = 0) -> torch.Tensor:
            stop = stops[name] - start
            return flat[stop - prod(shapes[name]) : stop].view(shapes[name])

        self._host = {name: cut(self._sent, name).numpy() for name in shapes}
        back = ("set_owners", "set_keys", "shortfall")
        self._back = {name: cut(self._came, name, self._read_from).numpy() for name in back}
        parts = {name: cut(self._device, name) for name in shapes}
        self.num_rows = parts.pop("num_rows")
        self.residency = DeviceResidency(
            **parts,
            block_of=torch.full(of_experts, -1, dtype=torch.int32, device=device),
            used_key=torch.full((1,), USED, dtype=torch.int32, device=device),
        )
        self._event = torch.cuda.Event() if is_pinned else None

    def upload(self, sets: FrameSets, frame_table: Ints, num_rows: int) -> None:
        """Queue it, in front of the step. What was read back before is over, so the host's buffer is free."""
        values = {
            "num_rows": num_rows,
            "frame_table": frame_table,
            "set_sizes": sets.sizes,
            "set_frames": sets.frames,
            "set_owners": sets.owners,
            "set_keys": sets.keys,
            "shortfall": 0,
        }
        for name, value in values.items():
            self._host[name][...] = value
        self._device.copy_(self._sent, non_blocking=True)

    def queue_back(self) -> None:
        """Copy back, as soon as the step is over."""
        self._came.copy_(self._device[self._read_from :], non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read_back(self) -> tuple[Ints, Ints]:
        """Owners and keys of all places, once they have come. Not to be kept."""
        if self._event is not None:
            self._event.synchronize()
        shortfall = int(self._back["shortfall"][0])
        assert not shortfall, f"{shortfall} experts found no frame in a captured step"
        return self._back["set_owners"], self._back["set_keys"]


class CapturedSteps:
    """The steps, and their layers as they are captured. `kernels` write into the arena that `memory` lends frames of."""

    def __init__(
        self,
        kernels: LayerKernels,
        its: Sizes,
        *,
        experts: PagedExperts,
        memory: MemoryManager,
        tier: HostTier,
        device: str,
    ):
        self._kernels = kernels
        self._sizes = its
        self._experts = experts
        self._memory = memory
        self._tier = tier
        self._state = StepState(its, device)
        self._has_blocks = False  # of all experts, and the device knows them
        self._is_queued_back = False
        self._rows = torch.arange(its.max_rows, dtype=torch.int32, device=device)
        # What each layer has chosen, -1 for rows that pad the step: the kernels' copy, and the host's to read.
        self._ids = torch.full(
            (its.num_layers, its.max_rows, its.top_k), -1, dtype=torch.int32, device=device
        )
        no_frames = torch.zeros(its.num_experts, dtype=torch.int32, device=device)
        self._page_ins = PageIns(no_frames, no_frames.clone(), no_frames[:1].clone())

    @contextmanager
    def capturing(self) -> Generator[None, None, None]:
        """Layers that are computed meanwhile are captured, or nothing is in them."""
        self._experts.captured = self
        yield
        self._experts.captured = None

    # ------------------------------------------------------------------------------------------------ while captured

    def compute(self, routing: Routed, weights: torch.Tensor, *, config: Any) -> torch.Tensor:
        """The layer's output `[rows, hidden]`, zeros for rows that pad the step: no expert comes for them."""
        layer, num_rows = routing.layer, len(routing.ids)
        is_padding = (self._rows[:num_rows] >= self._state.num_rows).unsqueeze(1)
        ids = self._ids[layer, :num_rows]
        ids.copy_(routing.ids).masked_fill_(is_padding, -1)
        state = self._state.residency
        self._kernels.decide(ids, layer, state=state, page_ins=self._page_ins)
        self._kernels.page_in(self._page_ins)
        output = self._kernels.forward(
            Routed(layer, ids, routing.logits, routing.hidden),
            weights,
            frame_table=state.frame_table[layer],
            config=config,
        )
        return output.masked_fill_(is_padding, 0)

    # ------------------------------------------------------------------------------------------------ while serving

    @contextmanager
    def lent(self, num_rows: int) -> Generator[bool, None, None]:
        """Whether a step of so many rows may be replayed now. If so, nobody else uses memory until this ends."""
        sets = self._lend(num_rows)
        if sets is None:
            yield False
            return
        self._state.upload(sets, self._memory.frame_table, num_rows)
        self._is_queued_back = False
        try:
            yield True
        finally:
            if not self._is_queued_back:  # it has failed
                self._state.queue_back()
            self._take_back(*self._state.read_back())

    def queued(self) -> None:
        """The step has been: what becomes of the sets can be on its way before anybody waits for it."""
        self._state.queue_back()
        self._is_queued_back = True

    def routing(self, num_rows: int) -> dict[int, torch.Tensor]:
        """What each layer has chosen in the step that was replayed: int32 `[num_rows, top_k]`."""
        return dict(enumerate(self._ids[:, :num_rows].cpu()))

    def _lend(self, num_rows: int) -> FrameSets | None:
        if num_rows > self._sizes.max_rows or not self._knows_blocks():
            return None
        return self._memory.lend(self._sizes.top_k * num_rows)

    def _take_back(self, owners: Ints, keys: Ints) -> None:
        self._memory.take_back(owners, keys)
        is_used = np.zeros(owners.shape, bool)
        layers, places = np.nonzero(keys == USED)
        is_used[layers, owners[layers, places]] = True
        for counter in self._experts.counters:
            counter.note_all(is_used)

    def _knows_blocks(self) -> bool:
        """Host memory holds all experts, and then keeps each where it is."""
        if not self._has_blocks and self._tier.holds_all:
            self._state.residency.block_of.copy_(torch.from_numpy(self._tier.block_table()))
            self._has_blocks = True
        return self._has_blocks


def captured_steps(
    experts: PagedExperts,
    arena: torch.Tensor,
    *,
    frame_bytes: int,
    memory: MemoryManager,
    tier: HostTier,
    top_k: int,
    max_rows: int,
) -> CapturedSteps:
    """For steps of up to so many rows. Raises ValueError where they could never run, with the flag to change."""
    num_layers, num_experts = memory.frame_table.shape
    if tier.as_stored:
        raise full_graphs_need_plain_experts()
    if tier.blocks.shape[1] % VECTOR_BYTES:
        raise full_graphs_need_whole_vectors(
            expert_bytes=tier.blocks.shape[1], vector_bytes=VECTOR_BYTES
        )
    if len(tier.blocks) < num_layers * num_experts:
        raise full_graphs_need_all_experts(
            host_bytes=tier.blocks.nbytes, expert_bytes=experts.store.total_bytes
        )
    kernels = TritonKernels(
        torch.from_numpy(tier.blocks), arena, frame_bytes=frame_bytes, experts=experts
    )
    its = Sizes(num_layers, num_experts, top_k, max_rows)
    return CapturedSteps(
        kernels, its, experts=experts, memory=memory, tier=tier, device=arena.device.type
    )
