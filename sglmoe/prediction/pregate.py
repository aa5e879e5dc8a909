"""Later gates asked early: what layer l's gate reads, shown to the gates of the layers after it.

The residual stream changes slowly, so they answer nearly what they will answer when it is their
turn (Eliseev and Mazur, arXiv 2312.17238; the baseline of arXiv 2510.26730, section 2).
"""

import numpy as np
import numpy.typing as npt

from sglmoe.prediction.predictor import LayerRouting, ModelParts, Scores, StepTokens
from sglmoe.prediction.router import Floats, Router, sigmoid
from sglmoe.prediction.token_union import any_token, sampled_tokens

# Tokens that stand for a step: all of them would find 0.3 points more of the experts of decode steps of 18 tokens in
# the mean (mixed-32), 1 point more of those of prefills.
MAX_TOKENS = 16
# How far from being chosen an expert of the next layer may be until that is unlikely, in standard deviations of the
# token's preferences; it grows with the root of the distance. Of 0.1, 0.2, 0.3 and 0.5 the one with the least
# squared error on the demo model. Softmax probabilities rank the experts of a step of 4 or 8 tokens worse (in the
# next layer by 2 to 3 points of recall), and so do ranks and the bare choices (by 1 to 2).
DOUBT = 0.2


class Pregate:
    """Predicts the `horizon` layers after the last one observed (default: all), and nothing beyond.

    One matrix product of [horizon * experts, hidden] and [hidden, tokens] a layer. Of steps with more
    than `max_tokens`, evenly spaced tokens stand for all.
    """

    wants_gate_input = True
    wants_probabilities = False

    def __init__(
        self,
        parts: ModelParts,
        router: Router,
        *,
        horizon: int | None = None,
        max_tokens: int = MAX_TOKENS,
    ):
        self._router = router
        self._shape = (parts.num_layers, parts.num_experts)
        self._horizon = parts.num_layers if horizon is None else horizon
        self._max_tokens = max_tokens
        self._doubts = doubts(parts.num_layers - 1)[:, None, None]
        self._scores: Scores = np.zeros(self._shape, np.float32)

    def begin_step(self, tokens: StepTokens) -> None:
        self._scores = np.zeros(self._shape, np.float32)

    def observe(self, routing: LayerRouting) -> None:
        hidden = routing.gate_input
        assert hidden is not None
        ahead = layers_ahead(routing.layer, self._horizon, len(self._scores))
        sampled = hidden[sampled_tokens(len(hidden), self._max_tokens)]
        margins = choice_margins(self._router, sampled, ahead)
        likely = sigmoid(margins / self._doubts[: len(margins)])
        self._scores = np.zeros(self._shape, np.float32)
        self._scores[ahead] = any_token(likely.swapaxes(0, 1), len(hidden))

    def scores(self) -> Scores:
        return self._scores

    def forget(self, owner: int) -> None:
        pass


def doubts(horizon: int) -> Floats:
    """`DOUBT` of layers at distances from 1 on, [horizon]."""
    distances = np.arange(1, horizon + 1, dtype=np.float32)
    roots: Floats = np.sqrt(distances)
    return np.float32(DOUBT) * roots


def layers_ahead(layer: int, horizon: int, num_layers: int) -> slice:
    return slice(layer + 1, min(layer + 1 + horizon, num_layers))


def choice_margins(router: Router, hidden: npt.NDArray[np.float32], layers: slice) -> Floats:
    """How much more each expert is preferred than the last of the top k, [layers, T, E].

    In standard deviations of the token's preferences, whose scale differs from model to model;
    -inf where the expert's group is out. `hidden`: [T, hidden].
    """
    preferences = router.preferences(router.logits(hidden, layers), layers)
    eligible = router.eligible(preferences)
    last = np.partition(eligible, -router.top_k, axis=-1)[..., -router.top_k, None]
    spread = preferences.std(axis=-1, keepdims=True)
    margins: Floats = (eligible - last) / np.maximum(spread, np.finfo(np.float32).tiny)
    return margins
