"""Shen's predictor: what later gates say early, plus a learned deviation from it.

arXiv 2510.26730, section 2.2, step 5: the pre-gate output, the token, and the experts that it
activated in the layers before give a deviation, learned offline; prediction = pre-gate + deviation.
There a random forest regresses probabilities. Here a network of one hidden layer adds to logits. One
that adds to probabilities, from the same features, finds fewer experts on the kind of text that it was
trained on (demo model: 1 to 7 points of recall), and more on a very different one (3 to 9).
"""

from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.errors import predictors
from sglmoe.prediction.prediction_cache import PredictionCache, TokenWindows
from sglmoe.prediction.predictor import LayerRouting, ModelParts, Scores, StepTokens
from sglmoe.prediction.pregate import MAX_TOKENS, choice_margins, layers_ahead
from sglmoe.prediction.router import Floats, Router, sigmoid
from sglmoe.prediction.token_union import any_token, sampled_tokens

# Of what an activated expert adds in a layer, so much is left in the next.
RECENCY = 0.8
# Arbitrary: a margin beyond that says no more. Those of experts in other groups are infinite.
MARGIN_LIMIT = 4.0
# Arbitrary: what cached predictions may take.
CACHE_BYTES = 64 * 2**20


SIZES = ("num_layers", "num_experts", "hidden_size", "width", "horizon")


class HybridParameters(msgspec.Struct, frozen=True, eq=False):
    """The network: float32, arrays of numpy here and tensors of torch while it is trained."""

    token: Any  # [hidden, width], for the token's input embedding
    recent: Any  # [L, E, width], for the experts it activated
    gate: Any  # [L, E, width], for the margins in the layer that is predicted
    offset: Any  # [S, L, width], for the distance, from 1, and the layer that is predicted
    output: Any  # [L, width, E]
    bias: Any  # [S, L, E]
    slope: Any  # [S], for the margins themselves

    @property
    def horizon(self) -> int:
        """S, how many layers ahead it predicts."""
        return len(self.slope)

    def to_tensors(self) -> tuple[dict[str, Floats], dict[str, int]]:
        """What to save: tensors by name, and the sizes that they agree on."""
        tensors = {name: getattr(self, name) for name in self.__struct_fields__}
        sizes = *self.bias.shape[1:], *self.token.shape, self.horizon
        return tensors, dict(zip(SIZES, sizes, strict=True))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Floats], sizes: dict[str, int]) -> "HybridParameters":
        """Raises ValueError for a size or a tensor that is missing, and for other tensors or shapes."""
        if missing := [name for name in SIZES if name not in sizes]:
            raise predictors.missing_sizes(names=missing)
        expected = shapes_of(sizes)
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if found != expected:
            raise predictors.wrong_tensors(found=str(found), expected=str(expected))
        return cls(**tensors)


def shapes_of(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter."""
    layers, experts, hidden, width, horizon = (sizes[name] for name in SIZES)
    return {
        "token": (hidden, width),
        "recent": (layers, experts, width),
        "gate": (layers, experts, width),
        "offset": (horizon, layers, width),
        "output": (layers, width, experts),
        "bias": (horizon, layers, experts),
        "slope": (horizon,),
    }


class Heads(NamedTuple):
    """What of the parameters depends on the layer and the distance, of P pairs of them."""

    gate: Any  # [P, E, width]
    offset: Any  # [P, 1, width]
    output: Any  # [P, width, E]
    bias: Any  # [P, 1, E]
    slope: Any  # [P, 1, 1]


def heads_of(parameters: HybridParameters, layers: Any, distances: Any) -> Heads:
    """`layers`, `distances`: integers [P], arrays of numpy or torch."""
    pairs = distances - 1, layers
    return Heads(
        gate=parameters.gate[layers],
        offset=parameters.offset[pairs][:, None],
        output=parameters.output[layers],
        bias=parameters.bias[pairs][:, None],
        slope=parameters.slope[distances - 1][:, None, None],
    )


def heads_ahead(parameters: HybridParameters, layers: slice) -> Heads:
    """Of the layer after the one that is observed, the one after that, and so on; large ones are views."""
    targets = np.arange(layers.start, layers.stop)
    heads = heads_of(parameters, targets, targets - layers.start + 1)
    return heads._replace(gate=parameters.gate[layers], output=parameters.output[layers])


def predicted_logits(heads: Heads, margins: Any, context: Any) -> Any:
    """Whether a token is going to choose an expert, [P, T, E]; of numpy or torch, as the arguments are.

    `margins`: [P, T, E], see `choice_margins`; `context`: [P or 1, T, width], of token and activated experts.
    """
    margins = margins.clip(-MARGIN_LIMIT, MARGIN_LIMIT)
    hidden = margins @ heads.gate + heads.offset + context
    hidden = hidden * (hidden > 0)
    return heads.slope * margins + hidden @ heads.output + heads.bias


def normalised(embeddings: Floats) -> Floats:
    """With a mean square of 1: [T, hidden]."""
    sizes = np.sqrt(np.square(embeddings).mean(axis=-1, keepdims=True))
    unit: Floats = embeddings / np.maximum(sizes, np.finfo(np.float32).tiny)
    return unit


class Hybrid:
    """Predicts the layers that its parameters reach, and nothing beyond.

    Of steps with more than `max_tokens`, evenly spaced tokens stand for all. With `window_tokens` a
    token that is the last of the same ones as another before it is taken to go the same way, and
    gates are not asked (section 2.2, step 5). Not by default: on the reference traces (python-1,
    arithmetic-1, turns-4, mixed-8) 8 save 6 to 18 % of the predictions, about what looking up costs; 4
    save 10 to 28 % and lose up to 1.3 points of recall, 2 save 21 to 59 % and lose up to 4.4.
    """

    wants_gate_input = True
    wants_probabilities = False

    def __init__(
        self,
        parts: ModelParts,
        router: Router,
        parameters: HybridParameters,
        *,
        max_tokens: int = MAX_TOKENS,
        window_tokens: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ):
        assert parts.embed is not None
        self._embed = parts.embed
        self._router = router
        self._parameters = parameters
        self._shape = (parts.num_layers, parts.num_experts)
        self._ahead = [
            layers_ahead(layer, parameters.horizon, parts.num_layers)
            for layer in range(parts.num_layers)
        ]
        self._heads = [heads_ahead(parameters, ahead) for ahead in self._ahead]
        self._max_tokens = max_tokens
        self._windows = TokenWindows(window_tokens) if window_tokens else None
        self.cache = PredictionCache(cache_bytes // (4 * parameters.horizon * parts.num_experts))
        self._scores: Scores = np.zeros(self._shape, np.float32)
        self._sampled = np.empty(0, np.intp)
        self._token = self._recent = np.empty((0, 0), np.float32)  # [sampled tokens, width]
        self._keys: list[bytes] = []  # of the sampled tokens

    def begin_step(self, tokens: StepTokens) -> None:
        self._sampled = sampled_tokens(tokens.num_tokens, self._max_tokens)
        embeddings = self._embed(tokens.token_ids[self._sampled])
        self._token = normalised(embeddings) @ self._parameters.token
        self._recent = np.zeros_like(self._token)
        if self._windows is not None:
            windows = self._windows.extend(tokens)
            self._keys = [windows[place].tobytes() for place in self._sampled]
        self._scores = np.zeros(self._shape, np.float32)

    def observe(self, routing: LayerRouting) -> None:
        hidden = routing.gate_input
        assert hidden is not None
        chosen = routing.expert_ids[self._sampled].astype(np.intp)
        activated = self._parameters.recent[routing.layer][chosen].sum(axis=1)
        self._recent = RECENCY * self._recent + activated
        ahead = self._ahead[routing.layer]
        self._scores = np.zeros(self._shape, np.float32)
        if ahead.start < ahead.stop:
            likely = self._by_token(routing.layer, hidden[self._sampled])
            self._scores[ahead] = any_token(likely, len(hidden))

    def scores(self) -> Scores:
        return self._scores

    def forget(self, owner: int) -> None:
        if self._windows is not None:
            self._windows.forget(owner)

    def _by_token(self, layer: int, hidden: npt.NDArray[Any]) -> Floats:
        """[sampled tokens, layers ahead, E]."""
        everyone = np.arange(len(hidden))
        if self._windows is None:
            return self._computed(layer, hidden, everyone)
        found = [self.cache.get(layer, key) for key in self._keys]
        missing = [place for place in everyone.tolist() if found[place] is None]
        if missing:
            computed = self._computed(layer, hidden, np.array(missing))
            for place, prediction in zip(missing, computed, strict=True):
                found[place] = prediction
                # A copy: the array it is part of has the other tokens too.
                self.cache.put(layer, self._keys[place], prediction.copy())
        return np.stack([prediction for prediction in found if prediction is not None])

    def _computed(
        self, layer: int, hidden: npt.NDArray[Any], places: npt.NDArray[np.intp]
    ) -> Floats:
        """The same, of the tokens at these places among the sampled ones."""
        margins = choice_margins(self._router, hidden[places], self._ahead[layer])
        context = self._token[places] + self._recent[places]
        return sigmoid(predicted_logits(self._heads[layer], margins, context)).swapaxes(0, 1)
