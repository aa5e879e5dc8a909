"""FineMoE's expert maps: a token goes where the past token that resembles it most went.

Paper: arXiv 2502.05370 v2; its sections are quoted. What it leaves open is decided here:

* Each token is an iteration of its own, a prompt's tokens too. Of a step with more than
  `max_tokens`, evenly spaced ones stand for all: they are searched for, and they alone are stored.
* A layer l > d is predicted with the trajectory of layers 1..l-d when its prefetch is due. Until it
  runs, the prediction follows the best trajectory of all layers observed by then, so distances
  below d are better than the paper's; those above d, which it never asks for, come from the same entry.
* Before the first layer is observed, layers after d have no prediction: no trajectory exists.
* Of the trajectory score in RDY the whole map counts, all L layers.
* Maps of one step are stored one after the other, so they don't overwrite each other unawares.
"""

import numpy as np
import numpy.typing as npt

from sglmoe.prediction.predictor import LayerRouting, ModelParts, Scores, StepTokens
from sglmoe.prediction.token_union import Floats, any_token, sampled_tokens

Places = npt.NDArray[np.intp]


def threshold(similarity: Floats) -> Floats:
    """delta = clip(1 - score, 0, 1) of section 4.4: the less alike, the more experts."""
    return np.clip(1 - similarity, 0, 1)


def mass_ahead(probabilities: Floats, top_k: int) -> Floats:
    """For each expert the summed probability of those likelier; -1 for the `top_k` likeliest.

    Experts in descending order until their sum reaches delta, and at least K of them (section 4.4),
    are those with a mass ahead of less than delta. `probabilities`: float32 [..., num_experts].
    """
    order = np.argsort(-probabilities, axis=-1)
    descending = np.take_along_axis(probabilities, order, axis=-1)
    ahead = np.cumsum(descending, axis=-1) - descending
    ahead[..., :top_k] = -1
    result = np.empty_like(probabilities)
    np.put_along_axis(result, order, ahead, axis=-1)
    return result


def redundancy(semantic: Floats, trajectory: Floats, *, distance: int, num_layers: int) -> Floats:
    """RDY = d/L * score_sem + (L-d)/L * score_traj of section 4.4, from cosines."""
    share = np.float32(distance / num_layers)
    return share * semantic + (1 - share) * trajectory


def plan_places(to_stored: Floats, among_new: Floats, *, capacity: int) -> list[int]:
    """Where to store new maps, one after the other: behind the others, or once the store is full
    over the one with the highest redundancy.

    `to_stored` [num_new, num_stored], `among_new` [num_new, num_new]: redundancies.
    """
    num_new, num_stored = to_stored.shape
    known = np.full((num_new, capacity), -np.inf, np.float32)
    known[:, :num_stored] = to_stored
    places = []
    for new in range(num_new):
        next_empty = num_stored + new
        place = next_empty if next_empty < capacity else int(known[new].argmax())
        known[:, place] = among_new[:, new]
        places.append(place)
    return places


class MapStore:
    """Up to `capacity` maps of past iterations, each with its token's embedding (section 4.2)."""

    def __init__(self, parts: ModelParts, *, prefetch_distance: int, capacity: int):
        shape = (parts.num_layers, capacity, parts.num_experts)
        self.num_maps = 0
        self._distance = prefetch_distance
        self._top_k = parts.top_k
        self._maps: Floats = np.zeros(shape, np.float32)  # P_l: full softmax
        self._mass_ahead: Floats = np.zeros(shape, np.float32)  # see the function
        # 1 / |P_1..P_l|: the norm of a map up to each layer.
        self._inverse_norms: Floats = np.zeros(shape[:2], np.float32)
        self._embeddings: Floats = np.zeros((capacity, 0), np.float32)  # of length 1

    def semantic(self, embeddings: Floats) -> Floats:
        """Cosines of embeddings of length 1, [tokens, hidden], to the stored: [tokens, num_maps]."""
        if not self.num_maps:
            return np.zeros((len(embeddings), 0), np.float32)
        cosines: Floats = embeddings @ self._embeddings[: self.num_maps].T
        return cosines

    def products(self, layer: int, probabilities: Floats) -> Floats:
        """This layer's part of the dot product of trajectories: [tokens, num_maps]."""
        products: Floats = probabilities @ self._maps[layer, : self.num_maps].T
        return products

    def trajectory(self, layer: int, products: Floats, squares: Floats) -> Floats:
        """Cosines of trajectories up to this layer, from sums of `products` and of squares [tokens]."""
        inverse_norms = self._inverse_norms[layer, : self.num_maps]
        cosines: Floats = products * inverse_norms / np.sqrt(squares)[:, np.newaxis]
        return cosines

    def predicted(self, layers: slice, similarity: Floats) -> Floats:
        """[tokens, layers, num_experts]: of the most similar map p where selected, else 0."""
        best = similarity.argmax(1)
        delta = threshold(similarity[np.arange(len(best)), best])
        maps = self._maps[layers, best].swapaxes(0, 1)
        ahead = self._mass_ahead[layers, best].swapaxes(0, 1)
        return np.where(ahead < delta[:, np.newaxis, np.newaxis], maps, 0)

    def add(self, maps: Floats, embeddings: Floats, semantic: Floats, trajectory: Floats) -> None:
        """Store maps [tokens, num_layers, num_experts], over the most redundant ones if need be.

        `embeddings` [tokens, hidden], of length 1; `semantic`, `trajectory`: their cosines to the stored.
        """
        num_new, num_layers = maps.shape[:2]
        flat = unit_length(maps.reshape(num_new, -1))

        def mixed(semantic: Floats, trajectory: Floats) -> Floats:
            return redundancy(semantic, trajectory, distance=self._distance, num_layers=num_layers)

        places = plan_places(
            mixed(semantic, trajectory),
            mixed(embeddings @ embeddings.T, flat @ flat.T),
            capacity=self._maps.shape[1],
        )
        newest = {place: new for new, place in enumerate(places)}
        self._write(list(newest), maps[list(newest.values())], embeddings[list(newest.values())])

    def _write(self, places: list[int], maps: Floats, embeddings: Floats) -> None:
        by_layer = maps.swapaxes(0, 1)
        self._maps[:, places] = by_layer
        self._mass_ahead[:, places] = mass_ahead(by_layer, self._top_k)
        norms = np.sqrt(np.square(by_layer).sum(2).cumsum(0))
        self._inverse_norms[:, places] = 1 / norms
        if self._embeddings.shape[1] != embeddings.shape[1]:
            self._embeddings = np.zeros((len(self._embeddings), embeddings.shape[1]), np.float32)
        self._embeddings[places] = embeddings
        self.num_maps = max(self.num_maps, *(place + 1 for place in places))


class _Step:
    """Tokens that are searched for, and what is known of their similarity to the stored maps."""

    def __init__(self, sampled: Places, num_tokens: int, embeddings: Floats, store: MapStore):
        self.sampled = sampled
        self.num_tokens = num_tokens
        self.embeddings = embeddings
        self.semantic = store.semantic(embeddings)
        self.map: list[Floats] = []  # P_l of each layer observed: [tokens, num_experts]
        self._products: Floats = np.zeros_like(self.semantic)
        self._squares: Floats = np.zeros(len(sampled), np.float32)

    def observe(self, probabilities: Floats, store: MapStore) -> None:
        self._products += store.products(len(self.map), probabilities)
        self._squares += np.square(probabilities).sum(1)
        self.map.append(probabilities)

    def trajectory(self, store: MapStore) -> Floats:
        return store.trajectory(len(self.map) - 1, self._products, self._squares)


class ExpertMap:
    """Semantic search for the first `prefetch_distance` layers, trajectory search for the others
    (section 4.3). Without `ModelParts.embed` those first layers have no prediction."""

    wants_gate_input = False
    wants_probabilities = True

    def __init__(
        self,
        parts: ModelParts,
        *,
        prefetch_distance: int = 3,  # d; the paper has 3 to 6, by model
        capacity: int = 1000,  # C, the paper's
        # Decoding 32 at once finds 6 points fewer if 16 stand for all (eval/traces/mixed-32); a prompt
        # is not worth more: 128 find no more than 32.
        max_tokens: int = 64,
    ):
        self._parts = parts
        self._distance = min(prefetch_distance, parts.num_layers)
        self._max_tokens = min(max_tokens, capacity)
        self._store = MapStore(parts, prefetch_distance=self._distance, capacity=capacity)
        self._step = self._new_step(np.zeros(0, np.int32))
        self._first_layers: Scores = np.zeros((self._distance, parts.num_experts), np.float32)
        self._scores: Scores | None = None

    @property
    def num_maps(self) -> int:
        """Stored so far."""
        return self._store.num_maps

    def begin_step(self, tokens: StepTokens) -> None:
        """A step whose last layer was never observed is dropped."""
        self._step = self._new_step(tokens.token_ids)
        has_embeddings = self._step.embeddings.shape[1] > 0
        similarity = self._step.semantic if has_embeddings else np.zeros((0, 0), np.float32)
        self._first_layers = self._union(slice(0, self._distance), similarity)
        self._scores = None

    def observe(self, routing: LayerRouting) -> None:
        step = self._step
        assert routing.layer == len(step.map), "layers are observed in order, none left out"
        step.observe(routing.probabilities[step.sampled].astype(np.float32), self._store)
        self._scores = None
        if len(step.map) == self._parts.num_layers and len(step.sampled):
            self._scores = np.zeros((self._parts.num_layers, self._parts.num_experts), np.float32)
            trajectory = step.trajectory(self._store)
            self._store.add(np.stack(step.map, 1), step.embeddings, step.semantic, trajectory)

    def scores(self) -> Scores:
        if self._scores is None:
            self._scores = self._new_scores()
        return self._scores

    def forget(self, owner: int) -> None:
        """Maps outlive the requests they come from."""

    def _new_step(self, token_ids: npt.NDArray[np.int32]) -> _Step:
        sampled = sampled_tokens(len(token_ids), self._max_tokens)
        embeddings = np.zeros((len(sampled), 0), np.float32)
        if self._parts.embed is not None and len(sampled):
            embeddings = unit_length(self._parts.embed(token_ids[sampled]))
        return _Step(sampled, len(token_ids), embeddings, self._store)

    def _new_scores(self) -> Scores:
        scores = np.zeros((self._parts.num_layers, self._parts.num_experts), np.float32)
        scores[: self._distance] = self._first_layers
        num_observed = len(self._step.map)
        if num_observed:
            layers = slice(max(num_observed, self._distance), self._parts.num_layers)
            scores[layers] = self._union(layers, self._step.trajectory(self._store))
        return scores

    def _union(self, layers: slice, similarity: Floats) -> Scores:
        """[layers, num_experts] of the step; nothing while nothing is stored."""
        if similarity.size == 0:
            return np.zeros((layers.stop - layers.start, self._parts.num_experts), np.float32)
        return any_token(self._store.predicted(layers, similarity), self._step.num_tokens)


def unit_length(vectors: Floats) -> Floats:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Floats = vectors / np.maximum(norms, np.float32(1e-30))
    return unit
