"""What others have to beat: predictors that learn nothing, or count.

Their scores of a step are what its tokens make likely together; see `token_union`.
"""

from collections import deque

import numpy as np
import numpy.typing as npt

from sglmoe.prediction.predictor import LayerRouting, ModelParts, Scores, StepTokens
from sglmoe.prediction.token_union import any_token, sampled_tokens

# Arbitrary: of so many requests that nobody has told to forget, the one idle longest is forgotten.
MAX_OWNERS = 4096


class LastStep:
    """A request uses the experts that its last token used ("token-level" heuristic of He et al., 3.6).

    A request's first step has none. Each request that predicts an expert halves the chance
    that it is not used: arbitrary, only the number of them counts.
    """

    wants_gate_input = False
    wants_probabilities = False

    def __init__(self, parts: ModelParts):
        self._shape = (parts.num_layers, parts.num_experts)
        self._top_k = parts.top_k
        # Of each request's last token: [num_layers, top_k], num_experts where nothing is known.
        self._experts: dict[int, npt.NDArray[np.int16]] = {}
        self._last_tokens: npt.NDArray[np.intp] = np.zeros(0, np.intp)  # of the step's requests
        self._running: list[npt.NDArray[np.int16]] = []  # these requests' entries of `_experts`
        self._scores: Scores = np.zeros(self._shape, np.float32)

    def begin_step(self, tokens: StepTokens) -> None:
        is_last = np.append(tokens.owners[1:] != tokens.owners[:-1], True)[: tokens.num_tokens]
        self._last_tokens = np.flatnonzero(is_last)
        owners = tokens.owners[self._last_tokens].tolist()
        self._scores = self._scores_of([o for o in owners if o in self._experts])
        self._running = [self._entry(owner) for owner in owners]
        while len(self._experts) > MAX_OWNERS:
            del self._experts[next(iter(self._experts))]

    def observe(self, routing: LayerRouting) -> None:
        chosen = routing.expert_ids[self._last_tokens]
        for entry, expert_ids in zip(self._running, chosen, strict=True):
            entry[routing.layer] = expert_ids

    def scores(self) -> Scores:
        return self._scores

    def forget(self, owner: int) -> None:
        self._experts.pop(owner, None)

    def _entry(self, owner: int) -> npt.NDArray[np.int16]:
        """The request's entry, from now on the one used last."""
        entry = self._experts.pop(owner, None)
        if entry is None:
            entry = np.full((self._shape[0], self._top_k), self._shape[1], np.int16)
        self._experts[owner] = entry
        return entry

    def _scores_of(self, owners: list[int]) -> Scores:
        num_layers, num_experts = self._shape
        if not owners:
            return np.zeros(self._shape, np.float32)
        experts = np.stack([self._experts[owner] for owner in owners])
        cells = np.arange(num_layers)[:, np.newaxis] * (num_experts + 1) + experts
        counts = np.bincount(cells.ravel(), minlength=num_layers * (num_experts + 1))
        counts = counts.reshape(num_layers, -1)[:, :num_experts]
        return 1 - np.exp2(-counts, dtype=np.float32)


class Frequency:
    """A token uses an expert as often as tokens lately did: f; one of a step's T does with 1 - (1 - f)^T."""

    wants_gate_input = False
    wants_probabilities = False

    def __init__(self, parts: ModelParts, *, half_life_tokens: float = 256):
        self._uses: Scores = np.zeros((parts.num_layers, parts.num_experts), np.float32)
        self._tokens: Scores = np.zeros((parts.num_layers, 1), np.float32)
        self._half_life_tokens = half_life_tokens
        self._scores: Scores = np.zeros_like(self._uses)

    def begin_step(self, tokens: StepTokens) -> None:
        frequency = np.minimum(self._uses / np.maximum(self._tokens, 1), 1)  # 1: rounding
        self._scores = 1 - (1 - frequency) ** np.float32(tokens.num_tokens)

    def observe(self, routing: LayerRouting) -> None:
        layer, num_tokens = routing.layer, len(routing.expert_ids)
        weight = 0.5 ** (num_tokens / self._half_life_tokens)
        uses = np.bincount(routing.expert_ids.ravel(), minlength=self._uses.shape[1])
        self._uses[layer] = self._uses[layer] * weight + uses
        self._tokens[layer] = self._tokens[layer] * weight + num_tokens

    def scores(self) -> Scores:
        return self._scores

    def forget(self, owner: int) -> None:
        """Nothing is kept of single requests."""


# Arbitrary: what a source expert has led to counts half after so many more uses of it.
MAX_USES = 512
# Arbitrary. Of a step with more tokens, as many stand for all.
MAX_TOKENS = 64
# Arbitrary. 48 layers x 128 experts keep 8 distances in 12 MiB, 48 x 512 keep 2 in 48 MiB.
MAX_COUNT_BYTES = 64 << 20


class PreviousLayer:
    """Experts of later layers that go with those just used: counts of P(e at l + s | e' at l), s = 1, 2, ...

    He's "layer-level" heuristic (3.6) takes the same expert numbers in the next layer. That
    means something only where training has made numbers correspond; which go together is
    learned here while serving. Of a token's experts e' the mean of P counts. Before the first
    layer, and more than `max_distance` layers ahead, nothing is predicted.
    """

    wants_gate_input = False
    wants_probabilities = False

    def __init__(self, parts: ModelParts, *, max_distance: int = 8):
        count_bytes = parts.num_layers * parts.num_experts**2 * np.dtype(np.uint16).itemsize
        self.max_distance = max(1, min(max_distance, MAX_COUNT_BYTES // count_bytes))
        self._shape = (parts.num_layers, parts.num_experts)
        self._top_k = parts.top_k
        # [num_layers, num_experts, max_distance, num_experts]: tokens that used e' at l and e at l + s.
        self._counts: npt.NDArray[np.uint16] = np.zeros(
            (*self._shape, self.max_distance, parts.num_experts), np.uint16
        )
        self._uses: npt.NDArray[np.int32] = np.zeros(
            self._shape, np.int32
        )  # since counts were halved
        self._recent: deque[LayerRouting] = deque(maxlen=self.max_distance)
        self._num_tokens = 0
        self._sampled: npt.NDArray[np.intp] = np.zeros(0, np.intp)
        self._scores: Scores | None = np.zeros(self._shape, np.float32)

    def begin_step(self, tokens: StepTokens) -> None:
        self._num_tokens = tokens.num_tokens
        self._sampled = sampled_tokens(tokens.num_tokens, MAX_TOKENS)
        self._recent.clear()
        self._scores = np.zeros(self._shape, np.float32)

    def observe(self, routing: LayerRouting) -> None:
        self._count(routing)
        self._note_uses(routing)
        self._recent.append(routing)
        self._scores = None

    def scores(self) -> Scores:
        if self._scores is None:
            self._scores = self._scores_after(self._recent[-1])
        return self._scores

    def forget(self, owner: int) -> None:
        """Nothing is kept of single requests."""

    def _count(self, routing: LayerRouting) -> None:
        """Pair its experts with those of the layers before it."""
        if not self._recent:
            return
        layers = np.array([r.layer for r in self._recent]).reshape(-1, 1, 1, 1)
        sources = np.stack([r.expert_ids[self._sampled] for r in self._recent])[..., np.newaxis]
        targets = routing.expert_ids[self._sampled, np.newaxis]
        cells = np.ravel_multi_index(
            (layers, sources, routing.layer - layers - 1, targets), self._counts.shape
        )
        # With four indices adding takes almost twice as long.
        np.add.at(self._counts.reshape(-1), cells.ravel(), np.uint16(1))

    def _note_uses(self, routing: LayerRouting) -> None:
        uses = self._uses[routing.layer]
        uses += np.bincount(routing.expert_ids[self._sampled].ravel(), minlength=self._shape[1])
        for expert in np.flatnonzero(uses > MAX_USES):
            self._counts[routing.layer, expert] >>= 1
            uses[expert] >>= 1

    def _scores_after(self, routing: LayerRouting) -> Scores:
        scores = np.zeros(self._shape, np.float32)
        first = routing.layer + 1
        num_ahead = min(self.max_distance, self._shape[0] - first)
        if num_ahead == 0:
            return scores
        expert_ids = routing.expert_ids[self._sampled]
        sources, place = np.unique(expert_ids, return_inverse=True)
        counts = self._counts[routing.layer, sources, :num_ahead].astype(np.float32)
        # Each pairing of a source with a token counts top_k experts. One more that led nowhere: no
        # expert is sure after a single one.
        num_pairings = counts.sum(2, keepdims=True) / self._top_k + 1
        given = (counts / num_pairings).reshape(len(sources), -1)
        is_source = np.zeros((len(expert_ids), len(sources)), np.float32)
        is_source[np.arange(len(expert_ids))[:, np.newaxis], place.reshape(expert_ids.shape)] = 1
        by_token = np.minimum(is_source @ given / self._top_k, 1)
        ahead = any_token(by_token, self._num_tokens).reshape(num_ahead, -1)
        scores[first : first + num_ahead] = ahead
        return scores
