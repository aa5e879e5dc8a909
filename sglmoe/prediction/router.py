"""The routers of a model, computed away from it: what gates say, and which experts follow."""

from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
ExpertIds = npt.NDArray[np.intp]


class Router(msgspec.Struct, frozen=True, eq=False):
    """The gates of all L layers that have experts, and the rule by which experts are chosen.

    The rules are SGLang's (`layers/moe/topk.py`): the top k of all, or of the best groups only. A
    group is as good as its best expert, and with a correction bias as its best two together
    (DeepSeek-V2 and V3). Phi-MoE's sparsemixer chooses the top 2; the rest of it is about weights.
    """

    weights: Floats  # [L, E, hidden]
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    logit_bias: Floats | None = None  # [L, E]
    correction_bias: Floats | None = None  # [L, E], added to scores for the choice alone
    num_groups: int = 1  # of E / num_groups experts that follow each other
    top_groups: int = 1  # whose experts a token may choose from

    @property
    def num_layers(self) -> int:
        return len(self.weights)

    def logits(self, hidden: npt.NDArray[Any], layers: slice) -> Floats:
        """What gates say to T tokens, [layers, T, E]. `hidden`: [T, hidden], some floats."""
        weights = self.weights[layers]
        num_layers, num_experts, size = weights.shape
        columns = weights.reshape(-1, size) @ hidden.astype(np.float32, copy=False).T
        by_layer = columns.reshape(num_layers, num_experts, len(hidden)).swapaxes(1, 2)
        logits: Floats = np.ascontiguousarray(by_layer)
        return logits if self.logit_bias is None else logits + self.logit_bias[layers, None]

    def probabilities(self, logits: Floats) -> Floats:
        """The scores that experts' weights are made of, of the logits' shape."""
        if self.scoring == "sigmoid":
            return sigmoid(logits)
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        normalised: Floats = exponentials / exponentials.sum(axis=-1, keepdims=True)
        return normalised

    def preferences(self, logits: Floats, layers: slice) -> Floats:
        """What experts are compared by, the highest first. `logits`, and these: [layers, T, E]."""
        if self.correction_bias is None:
            return logits  # in the order of their probabilities
        return self.probabilities(logits) + self.correction_bias[layers, None]

    def eligible(self, preferences: Floats) -> Floats:
        """Those of experts in each token's best groups; -inf for the others."""
        if self.top_groups == self.num_groups:
            return preferences
        grouped = preferences.reshape(*preferences.shape[:-1], self.num_groups, -1)
        num_best = 1 if self.correction_bias is None else 2
        worth = np.partition(grouped, -num_best, axis=-1)[..., -num_best:].sum(axis=-1)
        best = np.argsort(-worth, axis=-1, kind="stable")[..., : self.top_groups]
        is_out = np.ones(worth.shape, np.bool_)
        np.put_along_axis(is_out, best, False, axis=-1)
        left = np.where(is_out[..., None], np.float32(-np.inf), grouped)
        return left.reshape(preferences.shape)

    def choose(self, logits: Floats, layers: slice) -> tuple[ExpertIds, Floats]:
        """Expert ids [layers, T, top_k], first choice first, and `probabilities` of all experts."""
        choosable = self.eligible(self.preferences(logits, layers))
        order = np.argsort(-choosable, axis=-1, kind="stable")
        return order[..., : self.top_k], self.probabilities(logits)


def sigmoid(values: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    result: Floats = 0.5 * (1 + np.tanh(0.5 * values))
    return result
