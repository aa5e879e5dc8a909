"""Muon: momentum, orthogonalised. For matrices and stacks of matrices (the experts of a layer).

K. Jordan et al., "Muon: An optimizer for hidden layers" (2024); the scale that lets it share
AdamW's learning rate and weight decay is that of J. Liu et al., "Muon is scalable for LLM training"
(2025), section 2.2. `torch.optim.Muon` takes single matrices only.
"""

from collections.abc import Iterable
from typing import Any

import torch

# The quintic of the Newton-Schulz iteration, and how often: Jordan et al.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Parameters are [..., rows, columns]."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], *, lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
                update = orthogonalise(parameter.grad.lerp(momentum, MOMENTUM))
                scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """About the nearest orthogonal matrices: singular values between 0.7 and 1.2."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
