"""What a predictor of experts is told, and what it is asked.

A predictor only ever changes when an expert arrives, never what is computed: it may be wrong, or late.
Predictors belong to one thread.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

# [num_layers, num_experts], 0 to 1: how likely a step is to use an expert. A predictor's own figures
# need not be probabilities, only higher for what is likelier: `Calibration` makes probabilities of them.
Scores: TypeAlias = npt.NDArray[np.float32]


class StepTokens(msgspec.Struct, frozen=True, eq=False):
    """What is known of a step before its first layer: T tokens, those of a request one after the other."""

    token_ids: npt.NDArray[np.int32]  # [T]
    positions: npt.NDArray[np.int32]  # [T]
    owners: npt.NDArray[np.int32]  # [T]: a number for the request, the same in all its steps

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class LayerRouting(msgspec.Struct, frozen=True, eq=False):
    """What the router of one layer did with a step's T tokens."""

    layer: int  # among those with experts
    expert_ids: npt.NDArray[Any]  # [T, top_k], some integers
    # [T, num_experts], some floats: softmax over all experts, where the predictor wants it
    probabilities: npt.NDArray[Any]
    gate_input: npt.NDArray[Any] | None = None  # [T, hidden], where the predictor wants it


class Predictor(Protocol):
    """For each step: `begin_step`, then `observe` for each layer in ascending order; `scores` at any time."""

    wants_gate_input: bool  # these two: without, `observe` may be given those of no token
    wants_probabilities: bool

    def begin_step(self, tokens: StepTokens) -> None:
        """Another forward pass, over these tokens."""

    def observe(self, routing: LayerRouting) -> None:
        """The layer has chosen its experts. Arrays may be kept, not changed."""

    def scores(self) -> Scores:
        """Of the layers after the last one observed; other rows mean nothing. Not to be changed.

        After the last layer: of all layers of the next step, if the same requests decode on.
        """

    def forget(self, owner: int) -> None:
        """The request has ended; its number may be given to another one."""


Embed: TypeAlias = Callable[[npt.NDArray[np.int32]], npt.NDArray[np.float32]]


class ModelParts(msgspec.Struct, frozen=True, eq=False):
    """What of the model predictors may use."""

    num_layers: int  # that have experts
    num_experts: int
    top_k: int
    embed: Embed | None = None  # token ids [T] -> the model's input embeddings [T, hidden]
