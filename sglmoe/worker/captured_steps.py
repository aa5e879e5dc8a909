"""Decode steps that are one CUDA graph each: memory lends every layer a set of frames, the device pages within it.

Before a step the host uploads who is where and what may be replaced; the captured layers make residents of what their routers
choose, without it (`kernels/dispatch.py`); behind the step the host reads back what became of the sets. Which steps can run so
is known before they do: every layer has a frame for each expert that it might need, and host memory has all experts. No GPU has
run this.
"""

import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from msgspec.structs import asdict

from sglmoe.errors.budgets import (
    full_graphs_need_all_experts,
    full_graphs_need_whole_vectors,
)
from sglmoe.kernels.dispatch import Dispatched, dispatch
from sglmoe.kernels.exponent_codec.page_in_packed import PackedBlocks, page_in_packed
from sglmoe.kernels.mailbox import Mailbox, commit
from sglmoe.kernels.page_in import VECTOR_BYTES, page_in
from sglmoe.kernels.residency import DeviceResidency, PageIns
from sglmoe.memory.frame_sets import USED, FrameSets
from sglmoe.memory.host_tier import HostTier
from sglmoe.memory.manager import MemoryManager
from sglmoe.worker.moe_layer import PagedExperts
from sglmoe.worker.packed_blocks import new_packed_blocks, where_stored
from sglmoe.worker.routed import Routed
from sglmoe.worker.step_messages import Letters, RoutingMirror
from sglmoe.worker.step_state import IN_FLIGHT, Sizes, StepState

# Arbitrary: between two looks at how far a step has come, which leave the interpreter to threads that copy.
POLL_SECONDS = 20e-6
# How many steps go on with what was lent to one before them, where not all experts are in frames. Experts' worth is that of the
# first, and changes little: by `eval.memory_overhead` no more are missed than with 0, and 63 begin to miss more.
MAX_BEHIND = 15


class LayerKernels(Protocol):
    """What a captured layer does on the device."""

    def commit(
        self, mailbox: Mailbox, layer: int, state: DeviceResidency, *, step: torch.Tensor
    ) -> None:
        """See `mailbox.commit`."""

    def dispatch(
        self,
        routing: Routed,
        *,
        num_rows: torch.Tensor,
        state: DeviceResidency,
        page_ins: PageIns,
        ids: torch.Tensor,
    ) -> Any:
        """See `dispatch.dispatch`: what `forward` takes of it."""

    def page_in(self, page_ins: PageIns) -> None:
        """Copy these blocks of host memory into these frames."""

    def forward(
        self, routing: Routed, weights: torch.Tensor, dispatched: Any, *, config: Any
    ) -> torch.Tensor:
        """The layer's output, `[rows, hidden]`, zeros for rows that pad the step."""


class TritonKernels:
    """Ours, and SGLang's between them. `blocks`: the host's, page-locked, uint8 `[num_blocks, block_bytes]`, which hold experts
    as they lie in a frame, or where `packed` says; `arena`: its frames."""

    commit = staticmethod(commit)

    def __init__(
        self,
        blocks: torch.Tensor,
        arena: torch.Tensor,
        *,
        frame_bytes: int,
        experts: PagedExperts,
        packed: PackedBlocks | None,
    ):
        assert experts.grouped is not None  # on CUDA
        self._blocks = blocks
        self._arena = arena
        self._frame_bytes = frame_bytes
        self._grouped = experts.grouped
        self._packed = packed

    def dispatch(
        self,
        routing: Routed,
        *,
        num_rows: torch.Tensor,
        state: DeviceResidency,
        page_ins: PageIns,
        ids: torch.Tensor,
    ) -> Dispatched:
        return dispatch(
            routing.ids,
            routing.layer,
            num_rows=num_rows,
            state=state,
            page_ins=page_ins,
            ids=ids,
            block_tokens=self._grouped.block_tokens(routing.hidden, routing.ids),
        )

    def page_in(self, page_ins: PageIns) -> None:
        its: dict[str, Any] = {"frame_bytes": self._frame_bytes, **asdict(page_ins)}
        if self._packed is None:
            page_in(self._blocks, self._arena, **its)
        else:
            page_in_packed(self._blocks, self._arena, its=self._packed, **its)

    def forward(
        self, routing: Routed, weights: torch.Tensor, dispatched: Dispatched, *, config: Any
    ) -> torch.Tensor:
        hidden, ids = routing.hidden, routing.ids
        return self._grouped.forward_dispatched(hidden, weights, ids, dispatched, config=config)


class CapturedSteps:
    """The steps, and their layers as they are captured. `kernels` write into the arena that `memory` lends frames of.

    With `letters` experts may be prefetched while a step runs, and the observer of `experts` is told what it routes. `packed`:
    what `kernels` go by where host memory holds experts as they are stored.
    """

    def __init__(
        self,
        kernels: LayerKernels,
        its: Sizes,
        *,
        experts: PagedExperts,
        memory: MemoryManager,
        tier: HostTier,
        letters: Letters | None,
        device: str,
        packed: PackedBlocks | None = None,
    ):
        self._kernels = kernels
        self._packed = packed
        self._sizes = its
        self._experts = experts
        self._memory = memory
        self._tier = tier
        self.letters = letters
        self._mirror = RoutingMirror(its.num_layers, its.max_rows, device) if letters else None
        self._state = StepState(its, device)
        self._number = 0  # of the step
        self._num_rows = 0  # of it
        self._num_behind = 0  # steps that went on with what was lent to the one before
        self._running: deque[int] = deque(maxlen=IN_FLIGHT)  # numbers of those not taken back
        self._has_blocks = False  # of all experts, and the device knows them
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
        layer, kernels = routing.layer, self._kernels
        ids, state, number = self._ids[layer, : len(routing.ids)], self._state, self._state.number
        if self.letters is not None:
            kernels.commit(self.letters.mailbox, layer, state.residency, step=number)
        dispatched = kernels.dispatch(
            routing,
            num_rows=state.num_rows,
            state=state.residency,
            page_ins=self._page_ins,
            ids=ids,
        )
        if self._mirror is not None:
            self._mirror.copy(Routed(layer, ids, routing.logits, routing.hidden), number)
        kernels.page_in(self._page_ins)
        return kernels.forward(routing, weights, dispatched, config=config)

    # ------------------------------------------------------------------------------------------------ while serving

    def lend(self, num_rows: int) -> bool:
        """Whether a step of so many rows may be replayed now. If so, frames are lent until it is taken back; memory may begin
        prefetches meanwhile, no more."""
        sets = self._lend(num_rows)
        if sets is None:
            return False
        self._begin(num_rows)
        self._num_behind = 0
        self._state.upload(self._number, sets, self._memory.frame_table, num_rows)
        if self.letters is not None:
            self.letters.open(self._number)
        return True

    @property
    def num_behind(self) -> int:
        """How many steps may go on with what was lent once, as a rule."""
        return 0 if self.letters is not None else MAX_BEHIND

    @property
    def may_go_on(self) -> bool:
        """Whether another step may run behind the one that was queued, before that is taken back."""
        if not self.num_behind:
            return False
        return self._num_behind < self.num_behind or bool(self._memory.frame_table.min() >= 0)

    def go_on(self, num_rows: int) -> None:
        """Have a step of no more rows run with what the one before it makes of its frames."""
        self._begin(num_rows)
        self._num_behind += 1
        self._state.go_on(self._number, num_rows)

    def queued(self) -> None:
        """The step has been: what becomes of the sets can be on its way before anybody waits for it."""
        self._state.queue_back(self._number)

    def take_back(self, *, goes_on: bool = False) -> None:
        """Wait for the first step that was not taken back; `goes_on`: another one runs behind it."""
        number = self._running.popleft()
        assert bool(self._running) == goes_on
        sets = self._state.read_back(number)
        if self.letters is not None:
            self.letters.close()
        self._memory.take_back(sets, goes_on=goes_on)
        is_used = np.zeros(sets.owners.shape, bool)
        layers, places = np.nonzero(sets.keys == USED)
        is_used[layers, sets.owners[layers, places]] = True
        for counter in self._experts.counters:
            counter.note_all(is_used)

    def watch(self) -> None:
        """Tell the observer of each layer's routing as soon as it is known, until the step is over."""
        observer, mirror, layer = self._experts.observer, self._mirror, 0
        if observer is None or mirror is None:
            return
        while layer < self._sizes.num_layers:
            is_over = self._state.is_back(self._number)
            while layer < self._sizes.num_layers and (is_over or mirror.has(layer, self._number)):
                observer.routed(layer, mirror.routed(layer, self._num_rows))
                observer.look_ahead()
                layer += 1
            observer.look_ahead()
            time.sleep(POLL_SECONDS)

    def routing(self) -> dict[int, torch.Tensor]:
        """What each layer has chosen in the step that was replayed: int32 `[rows, top_k]`."""
        return dict(enumerate(self._ids[:, : self._num_rows].cpu()))

    def _lend(self, num_rows: int) -> FrameSets | None:
        if num_rows > self._sizes.max_rows or not self._knows_blocks():
            return None
        observer = self._experts.observer
        num_ahead = observer.num_ahead if observer is not None and self.letters is not None else 0
        return self._memory.lend(self._sizes.top_k * num_rows, num_ahead=num_ahead)

    def _begin(self, num_rows: int) -> None:
        self._number += 1
        self._num_rows = num_rows
        self._running.append(self._number)

    def _knows_blocks(self) -> bool:
        """Host memory holds all experts, and then keeps each where it is."""
        if not self._has_blocks and self._tier.holds_all:
            self._state.residency.block_of.copy_(torch.from_numpy(self._tier.block_table()))
            if self._packed is not None:
                places = where_stored(self._tier, self._experts.store)
                self._packed.stored.copy_(torch.from_numpy(places))
            self._has_blocks = True
        return self._has_blocks


def captured_steps(
    its: Sizes,
    experts: PagedExperts,
    arena: torch.Tensor,
    frame_bytes: int,
    *,
    memory: MemoryManager,
    tier: HostTier,
    letters: Letters | None,
) -> CapturedSteps:
    """Of those sizes, on those frames. Raises ValueError where they could never run, with the flag to change."""
    store, device = experts.store, arena.device.type
    num_experts = its.num_layers * its.num_experts
    if store.expert_bytes() % VECTOR_BYTES:
        raise full_graphs_need_whole_vectors(
            expert_bytes=store.expert_bytes(), vector_bytes=VECTOR_BYTES
        )
    if len(tier.blocks) < num_experts:
        raise full_graphs_need_all_experts(
            host_bytes=tier.blocks.nbytes, expert_bytes=num_experts * tier.blocks.shape[1]
        )
    packed = new_packed_blocks(tier, store, device) if tier.as_stored else None
    kernels = TritonKernels(
        torch.from_numpy(tier.blocks),
        arena,
        frame_bytes=frame_bytes,
        experts=experts,
        packed=packed,
    )
    return CapturedSteps(
        kernels,
        its,
        experts=experts,
        memory=memory,
        tier=tier,
        letters=letters,
        device=device,
        packed=packed,
    )
