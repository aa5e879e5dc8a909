"""What a layer's router did, on its way from the device to the predictor."""

from collections.abc import Callable

import msgspec
import numpy as np
import torch

from sglmoe.predictor.messages import Event, LayerRouted, array_bytes


class Routed(msgspec.Struct, frozen=True, eq=False):
    """Tensors of the device that the model may change later: T tokens."""

    layer: int
    ids: torch.Tensor  # [T, top_k]
    logits: torch.Tensor  # [T, experts]
    hidden: torch.Tensor  # [T, hidden], the router's input

    def first(self, num_tokens: int) -> "Routed":
        rows = slice(num_tokens)
        return Routed(self.layer, self.ids[rows], self.logits[rows], self.hidden[rows])

    def to_host(
        self, frames: bytes, *, with_logits: bool, with_gate_input: bool
    ) -> "RoutingOnItsWay":
        """Begins to copy, what of it is wanted. `frames`: see `messages.LayerRouted`."""
        logits = self.logits if with_logits else None
        hidden = self.hidden if with_gate_input else None
        if self.ids.is_cpu:
            return RoutingOnItsWay(self.layer, self.ids, logits, hidden, frames, always)
        wanted = [its for its in (self.ids, logits, hidden) if its is not None]
        (ids, *others), is_there = copy_to_host(wanted)
        return RoutingOnItsWay(
            layer=self.layer,
            ids=ids,
            logits=others.pop(0) if with_logits else None,
            hidden=others.pop(0) if with_gate_input else None,
            frames=frames,
            is_there=is_there,
        )


class RoutingOnItsWay(msgspec.Struct, frozen=True, eq=False):
    """A `client.Coming`; on a CPU it has arrived, and its tensors are the model's own."""

    layer: int
    ids: torch.Tensor
    logits: torch.Tensor | None
    hidden: torch.Tensor | None
    frames: bytes
    is_there: Callable[[], bool]

    def event(self) -> Event:
        ids = self.ids.numpy()
        return LayerRouted(
            layer=self.layer,
            num_tokens=len(ids),
            expert_ids=array_bytes(ids, np.int32),
            logits=float_bytes(self.logits),
            gate_input=float_bytes(self.hidden),
            frames=self.frames,
        )


def float_bytes(tensor: torch.Tensor | None) -> bytes:
    return b"" if tensor is None else tensor.float().numpy().tobytes()


def copy_to_host(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], bool]]:
    """Copies, and what says whether they are there; no GPU has run this."""
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return copies, copied.query


def always() -> bool:
    return True
