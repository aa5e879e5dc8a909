"""What a layer's router did, on its way from the device to the predictor's thread."""

from collections.abc import Callable

import msgspec
import torch

from sglmoe.prediction.predictor import LayerRouting


class Routed(msgspec.Struct, frozen=True, eq=False):
    """Tensors of the device that the model may change later: T tokens."""

    layer: int
    ids: torch.Tensor  # [T, top_k]
    logits: torch.Tensor  # [T, experts]
    hidden: torch.Tensor  # [T, hidden], the router's input

    def arrays(
        self, *, with_probabilities: bool, with_gate_input: bool
    ) -> Callable[[], LayerRouting]:
        """Begins to copy; what it returns waits for that, and may be called later in another thread.

        Without probabilities there are those of no token.
        """
        logits = self.logits if with_probabilities else self.logits[:0]
        hidden = self.hidden if with_gate_input else self.hidden[:0]
        (ids, logits, hidden), wait = copy_to_host(self.ids, logits, hidden)

        def arrays() -> LayerRouting:
            wait()
            probabilities = logits.float().softmax(dim=-1).numpy()
            gate_input = hidden.float().numpy() if with_gate_input else None
            return LayerRouting(self.layer, ids.numpy(), probabilities, gate_input)

        return arrays


def copy_to_host(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """Copies, and what returns when they are there; no GPU has run that part."""
    if tensors[0].device.type == "cpu":
        return [tensor.clone() for tensor in tensors], lambda: None
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return copies, copied.synchronize
