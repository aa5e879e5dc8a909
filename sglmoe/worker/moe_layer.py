"""SGLang's fused MoE layer with its experts in the arena.

`PagedExperts` stands behind every MoE layer of the model: while the checkpoint is read it collects references to the experts'
tensors, then it computes each layer from whatever frames `MemoryManager.waves` makes resident. Models, routers and top-k are
sglang's; only the methods that create and apply expert weights are replaced (`moe_layer_method.py`).
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
import torch
from torch.nn import functional as F

from sglmoe.errors import models
from sglmoe.errors.checkpoints import wrong_shape
from sglmoe.memory.arena import Geometry
from sglmoe.memory.checkpoint_form import Converted, checkpoint_form
from sglmoe.memory.expert_layout import ExpertFormat, ExpertLayout, Plain, plan_layout
from sglmoe.memory.experts import ExpertIds
from sglmoe.memory.store import ExpertStore
from sglmoe.memory.use_counter import UseCounter
from sglmoe.worker.frame_views import FrameViews
from sglmoe.worker.routed import Routed

if TYPE_CHECKING:
    from sglmoe.worker.captured_steps import CapturedSteps
    from sglmoe.worker.moe_layer_grouped import GroupedExperts

Waves = Callable[[int, ExpertIds], Iterator[ExpertIds]]
Activation = Callable[[torch.Tensor], torch.Tensor]


class Observer(Protocol):
    """Who wants to know of routing as it happens, and to do something between layers."""

    def routed(self, layer: int, routing: Routed) -> None:
        """The layer has chosen its experts, and has not asked memory for them."""

    def look_ahead(self) -> None:
        """Its experts are coming, or it is done."""

    @property
    def num_ahead(self) -> int:
        """So many experts may it bring in while a step runs."""


class ExpertShape(msgspec.Struct, frozen=True):
    """What all experts of a model have in common: w13 is `[2 * inner, hidden]`, w2 `[hidden, inner]`."""

    num_experts: int
    hidden: int
    inner: int
    format: ExpertFormat

    @property
    def layout(self) -> ExpertLayout:
        return plan_layout(self.format, hidden=self.hidden, inner=self.inner)


class PagedExperts:
    """All experts of the model: where they come from, and how a layer computes with them."""

    def __init__(self, store: ExpertStore, on_tensor: Callable[[], None], inner_multiple: int = 1):
        """`inner_multiple`: SGLang rounds experts' inner size up to such a multiple, with zeros."""
        self.store = store
        self._inner_multiple = inner_multiple
        self.shape: ExpertShape | None = None
        self.layout: ExpertLayout | None = None
        self.layer_ids: list[int] = []  # sglang's layer_id of each MoE layer, in order
        self._on_tensor = on_tensor
        self.waves: Waves | None = None  # asked for a layer's experts; None before `attach`
        self.counters: list[UseCounter] = []  # told of every use
        self.observer: Observer | None = None
        self.num_tokens = 0  # of the running pass: rows behind these pad a captured batch
        self.captured: CapturedSteps | None = None  # while sglang captures whole steps
        self._frame_table = np.empty((0, 0), dtype=np.int32)
        self._views: FrameViews | None = None  # None before `attach`
        self.grouped: GroupedExperts | None = None  # on CUDA
        self._routing: dict[int, torch.Tensor] | None = None
        self._router_logits: dict[int, torch.Tensor] | None = None

    # ------------------------------------------------------------------------------------------------ while loading

    def add_layer(self, layer_id: int, shape: ExpertShape) -> int:
        """Register a layer; its place in the frame table."""
        if self.shape is None:
            self.shape, self.layout = shape, shape.layout
            self.store.lay_out(self.layout.part_offsets())
        if shape != self.shape:
            raise models.uneven_experts(layer=layer_id, shape=str(shape), first=str(self.shape))
        self.layer_ids.append(layer_id)
        return len(self.layer_ids) - 1

    def take_tensor(self, layer: int, expert: int, part: str, tensor: torch.Tensor) -> None:
        """Remember one tensor of the checkpoint; a view of the mapped file stays a view.

        It may have another type than a frame has, such as scales in bfloat16, which kernels read in float32; and where the
        format says so another form, from which it is converted each time it is read.
        """
        assert self.shape is not None
        assert self.layout is not None
        expected = self.layout.tensor_of(part)
        tensor = self._rounded_up(tensor, part)
        dtype = str(tensor.dtype).removeprefix("torch.")
        form = checkpoint_form(self.shape.format, expected, dtype)
        if tuple(tensor.shape) != form.shape or form.dtype not in (None, dtype):
            raise wrong_shape(
                layer=layer,
                expert=expert,
                part=part,
                shape=shown(tuple(tensor.shape), dtype),
                expected=shown(form.shape, form.dtype or dtype),
            )
        if form.convert is None:
            raw = as_bytes(tensor.to(getattr(torch, expected.dtype)).contiguous())
            self.store.put(layer, expert, part, raw)
        else:
            raw = as_bytes(tensor.contiguous())
            self.store.put(layer, expert, part, Converted(raw, expected.part_bytes, form.convert))
        self._on_tensor()

    def _rounded_up(self, matrix: torch.Tensor, part: str) -> torch.Tensor:
        """The matrix with as many zeros as make its inner size the model's; itself if it has that."""
        assert self.shape is not None
        if not isinstance(self.shape.format, Plain):
            return matrix  # whole blocks and groups, which is what SGLang rounds such up to: `refused_model`
        dim = 1 if part == "w2" else 0
        missing = self.shape.inner - matrix.shape[dim]
        if not 0 < missing < self._inner_multiple:
            return matrix
        return F.pad(matrix, (0, missing) if dim else (0, 0, 0, missing))

    # ------------------------------------------------------------------------------------------------ while serving

    def attach(
        self,
        arena: torch.Tensor,
        geometry: Geometry,
        *,
        frame_table: np.ndarray,
        waves: Waves,
    ) -> None:
        """Look at the arena (`uint8`) as experts: an expert lies at the start of its frame, as `layout` says.

        `frame_table`: int32 `[layers, experts]`, the frame of each expert; `waves` keeps it true while it iterates.
        """
        assert self.shape is not None
        assert self.layout is not None
        self._views = FrameViews(arena, geometry, self.layout, self.shape.format)
        self._frame_table = frame_table
        self.waves = waves
        if arena.device.type != "cpu":
            from sglmoe.worker.moe_layer_grouped import GroupedExperts

            self.grouped = GroupedExperts(self._views, self.shape.num_experts)

    def record_routing(self, record: bool, *, with_logits: bool = False) -> None:
        """Start to keep the expert ids of the coming forward pass, and the router's logits too, or stop."""
        self._routing = {} if record else None
        self._router_logits = {} if with_logits else None

    def routing(self, num_layers: int) -> torch.Tensor:
        """The recorded ids, int32 `[tokens, num_layers, top_k]`; zeros for layers without experts."""
        assert self._routing, "no MoE layer ran since record_routing"
        any_ids = next(iter(self._routing.values()))
        ids = any_ids.new_zeros((any_ids.shape[0], num_layers, any_ids.shape[1]), dtype=torch.int32)
        for layer, layer_ids in self._routing.items():
            ids[:, self.layer_ids[layer]] = layer_ids
        return ids

    def replayed(self, routing: dict[int, torch.Tensor]) -> None:
        """A graph has computed the pass's layers, which chose these: by layer, int32 `[tokens, top_k]`."""
        self._routing = routing

    def trace(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What was recorded with logits: expert ids, int32 `[tokens, MoE layers, top_k]`, and the softmax over all
        experts, float16 `[tokens, MoE layers, experts]`."""
        assert self._routing, "no MoE layer ran since record_routing"
        assert self._router_logits is not None
        layers = range(len(self.layer_ids))
        logits = torch.stack([self._router_logits[layer] for layer in layers], dim=1)
        ids = torch.stack([self._routing[layer] for layer in layers], dim=1)
        return ids, logits.softmax(dim=-1).to(torch.float16)

    def note_router(self, routing: Routed) -> None:
        """What the layer's router said before the top k were chosen, and after."""
        if self._routing is not None:
            self._routing[routing.layer] = routing.ids.to(torch.int32, copy=True)
        if self._router_logits is not None:
            self._router_logits[routing.layer] = routing.logits.to(torch.float32, copy=True)
        if self.observer is not None:
            self.observer.routed(routing.layer, routing)

    def compute(
        self, routing: Routed, weights: torch.Tensor, *, config: Any, activation: Activation
    ) -> torch.Tensor:
        """The layer's output `[rows, hidden]`: `forward` for the pass's tokens, zeros for rows that pad a captured batch.

        Those were routed as any token is, and nobody gets to know; all are such in the passes with which SGLang tries a
        model out at start-up. `weights`: `[rows, top_k]`; others as of `forward`.
        """
        if self.captured is not None:
            return self.captured.compute(routing, weights, config=config)
        if padding := len(routing.hidden) - self.num_tokens:
            output = torch.zeros_like(routing.hidden)
            if self.num_tokens:
                routing, weights = routing.first(self.num_tokens), weights[: self.num_tokens]
                output[:-padding] = self._note_and_forward(routing, weights, config, activation)
            return output
        return self._note_and_forward(routing, weights, config, activation)

    def _note_and_forward(
        self, routing: Routed, weights: torch.Tensor, config: Any, activation: Activation
    ) -> torch.Tensor:
        self.note_router(routing)
        layer, hidden, ids = routing.layer, routing.hidden, routing.ids
        return self.forward(layer, hidden, weights, ids, config=config, activation=activation)

    def forward(
        self,
        layer: int,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        *,
        config: Any,
        activation: Activation,
    ) -> torch.Tensor:
        """The layer's output `[tokens, hidden]`, bit for bit that of the stock layer on this device.

        `hidden`: `[tokens, hidden]`; `weights`, `ids`: `[tokens, top_k]`; `config`: SGLang's MoeRunnerConfig, and
        `activation` what it asks for between an expert's two products.
        """
        if self.grouped is None:
            return self.forward_by_expert(layer, hidden, weights, ids, activation)
        return self.grouped.forward(
            hidden,
            weights,
            ids,
            waves=self._observed_waves(layer, np.unique(ids.cpu().numpy())),
            frame_of=self._frame_table[layer],
            config=config,
        )

    def forward_by_expert(
        self,
        layer: int,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        activation: Activation,
    ) -> torch.Tensor:
        """What sglang's `moe_forward_native` computes, which a CPU's stock layer runs, on weights that are dequantised where
        they are not plain; arguments as above.

        Tokens are sorted by expert as there, so every expert multiplies the same rows in the same order, whichever frame it
        is in and whichever wave it runs in; outputs are combined once, when all waves have run.
        """
        assert self._views is not None
        order = ids.reshape(-1).argsort()
        sorted_hidden = hidden[order // ids.shape[1]]
        bounds = expert_bounds(ids)
        frame_of = self._frame_table[layer]
        outputs: dict[int, torch.Tensor] = {}
        for wave in self._observed_waves(layer, np.fromiter(bounds, np.intp, len(bounds))):
            for expert in wave.tolist():
                start, stop = bounds[expert]
                w13, w2 = self._views.matrices(int(frame_of[expert]), hidden.dtype)
                inner = activation(F.linear(sorted_hidden[start:stop], w13))
                outputs[expert] = F.linear(inner, w2)
        return combine((outputs[expert] for expert in bounds), order, weights, hidden)

    def _observed_waves(self, layer: int, experts: ExpertIds) -> Generator[ExpertIds, None, None]:
        """The waves; whoever looks ahead may do so when one begins, and behind the last."""
        assert self.waves is not None
        for counter in self.counters:
            counter.note(layer, experts)
        for wave in self.waves(layer, experts):
            if self.observer is not None:
                self.observer.look_ahead()
            yield wave
        if self.observer is not None:
            self.observer.look_ahead()


def expert_bounds(ids: torch.Tensor) -> dict[int, tuple[int, int]]:
    """Which rows, after sorting by expert, belong to which: expert -> (start, stop), in ascending order of experts."""
    experts, counts = np.unique(ids.cpu().numpy(), return_counts=True)
    stops = counts.cumsum()
    return {
        expert: (stop - count, stop)
        for expert, count, stop in zip(
            experts.tolist(), counts.tolist(), stops.tolist(), strict=True
        )
    }


def combine(
    outputs: Iterable[torch.Tensor],
    order: torch.Tensor,
    weights: torch.Tensor,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """Undo the sort and sum each token's experts by their weights, as `moe_forward_native` does."""
    sorted_outputs = torch.cat(list(outputs), dim=0)
    unsorted = torch.empty_like(sorted_outputs)
    unsorted[order] = sorted_outputs
    return (
        unsorted.view(*weights.shape, -1)
        .type(weights.dtype)
        .mul_(weights.unsqueeze(dim=-1))
        .sum(dim=1)
        .type(hidden.dtype)
    )


def shown(shape: tuple[int, ...], dtype: str) -> str:
    return f"{shape} in {dtype}"


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's bytes, without a copy: uint8 `[nbytes]`."""
    array: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()
    return array
