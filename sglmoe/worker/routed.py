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

    def to_host(
        self, residents: bytes, *, with_logits: bool, with_gate_input: bool
    ) -> "RoutingOnItsWay":
        """Begins to copy, what of it is wanted. `residents`: `pack_mask` of the experts that are in frames."""
        logits = self.logits if with_logits else self.logits[:0]
        hidden = self.hidden if with_gate_input else self.hidden[:0]
        copies, is_there = copy_to_host(self.ids, logits, hidden)
        return RoutingOnItsWay(self.layer, copies, residents, is_there)


class RoutingOnItsWay:
    """A `client.Coming`; on a CPU it has arrived, and its tensors are the model's own."""

    def __init__(
        self,
        layer: int,
        copies: list[torch.Tensor],
        residents: bytes,
        is_there: Callable[[], bool],
    ):
        self._layer = layer
        self._copies = copies
        self._residents = residents
        self.is_there = is_there

    def event(self) -> Event:
        ids, logits, hidden = self._copies
        return LayerRouted(
            layer=self._layer,
            num_tokens=len(ids),
            expert_ids=array_bytes(ids.numpy(), np.int16),
            logits=array_bytes(logits.float().numpy(), np.float32),
            gate_input=array_bytes(hidden.float().numpy(), np.float32),
            residents=self._residents,
        )


def copy_to_host(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], Callable[[], bool]]:
    """Copies, and what says whether they are there; no GPU has run that part."""
    if tensors[0].device.type == "cpu":
        return list(tensors), lambda: True
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return copies, copied.query
