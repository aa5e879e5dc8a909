"""Pre-gating plus a deviation: 3 layers of 4 experts, 2 of which a token uses; tokens 0 to 4."""

from typing import Any

import numpy as np
import pytest

from sglmoe.prediction.hybrid import RECENCY, Hybrid, HybridParameters
from sglmoe.prediction.predictor import LayerRouting, ModelParts, StepTokens
from sglmoe.prediction.pregate import Pregate, doubts
from sglmoe.prediction.router import Router

EMBEDDINGS = 2 * np.eye(5, 4, dtype=np.float32)  # token 4 is all zeros; a mean square of 1 is 2
PARTS = ModelParts(num_layers=3, num_experts=4, top_k=2, embed=lambda ids: EMBEDDINGS[ids])
ROUTER = Router(np.tile(np.eye(4, dtype=np.float32), (3, 1, 1)), 2)
SIZES = {"num_layers": 3, "num_experts": 4, "hidden_size": 4, "width": 4, "horizon": 2}


def parameters(**changed: Any) -> HybridParameters:
    """Those without any deviation."""
    zeros: dict[str, Any] = {
        "token": np.zeros((4, 4), np.float32),
        "recent": np.zeros((3, 4, 4), np.float32),
        "gate": np.zeros((3, 4, 4), np.float32),
        "offset": np.zeros((2, 3, 4), np.float32),
        "output": np.zeros((3, 4, 4), np.float32),
        "bias": np.zeros((2, 3, 4), np.float32),
        "slope": 1 / doubts(2),
    }
    return HybridParameters(**(zeros | changed))


def begin(predictor: Hybrid | Pregate, token_ids: list[int], position: int = 0) -> None:
    ids = np.array(token_ids, np.int32)
    positions = position + np.arange(len(ids), dtype=np.int32)
    predictor.begin_step(StepTokens(ids, positions, np.zeros(len(ids), np.int32)))


def observe(
    predictor: Hybrid | Pregate,
    layer: int,
    *hidden: list[float],
    chosen: tuple[int, int] = (0, 1),
) -> np.ndarray:
    ids = np.array([chosen] * len(hidden), np.uint8)
    nothing = np.zeros((len(hidden), 4))
    predictor.observe(LayerRouting(layer, ids, nothing, np.array(hidden, np.float32)))
    return predictor.scores()


def logit(probability: np.ndarray) -> np.ndarray:
    odds: np.ndarray = np.log(probability / (1 - probability))
    return odds


UNDECIDED = [0.0, 0, 0, 0]  # a gate input on which all margins are 0


def test_without_a_deviation_it_is_pregate() -> None:
    hybrid, pregate = Hybrid(PARTS, ROUTER, parameters()), Pregate(PARTS, ROUTER)
    tokens = [[0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.1, 0.3], [0.9, 0, 0.2, 0.7]]
    for predictor in (hybrid, pregate):
        begin(predictor, [0, 1, 2])
    for layer in range(3):
        scores = [observe(predictor, layer, *tokens) for predictor in (hybrid, pregate)]
        np.testing.assert_allclose(*scores, atol=1e-4)


def test_it_looks_as_far_ahead_as_it_has_learned() -> None:
    nearest = parameters(offset=np.zeros((1, 3, 4)), bias=np.zeros((1, 3, 4)), slope=np.ones(1))
    hybrid = Hybrid(PARTS, ROUTER, nearest)
    begin(hybrid, [0])
    assert observe(hybrid, 0, UNDECIDED).any(axis=1).tolist() == [False, True, False]


def test_the_token_moves_the_prediction() -> None:
    # Token 1 speaks, with 1, for expert 3 of layer 1.
    token = np.diag([0, 0.5, 0, 0]).astype(np.float32)
    output = np.zeros((3, 4, 4), np.float32)
    output[1, 1, 3] = 5
    hybrid = Hybrid(PARTS, ROUTER, parameters(token=token, output=output))
    begin(hybrid, [1])
    assert logit(observe(hybrid, 0, UNDECIDED)[1]) == pytest.approx([0, 0, 0, 5], abs=1e-4)
    begin(hybrid, [2])
    assert logit(observe(hybrid, 0, UNDECIDED)[1]) == pytest.approx([0, 0, 0, 0], abs=1e-4)


def test_activated_experts_move_it_and_fade() -> None:
    recent = np.zeros((3, 4, 4), np.float32)
    recent[0, 2, 0] = recent[0, 3, 0] = 1  # experts 2 and 3 of layer 0 speak for expert 1
    output = np.zeros((3, 4, 4), np.float32)
    output[:, 0, 1] = 1
    learned = parameters(recent=recent, output=output)
    hybrid = Hybrid(PARTS, ROUTER, learned, window_tokens=0)
    begin(hybrid, [0])
    scores = observe(hybrid, 0, UNDECIDED, chosen=(2, 3))
    assert logit(scores[2])[1] == pytest.approx(2, abs=1e-4)
    scores = observe(hybrid, 1, UNDECIDED, chosen=(0, 1))
    assert logit(scores[2])[1] == pytest.approx(2 * RECENCY, abs=1e-4)
    begin(hybrid, [0])  # another step, that knows nothing of it
    assert logit(observe(hybrid, 0, UNDECIDED)[1])[1] == pytest.approx(0, abs=1e-4)


def test_what_later_gates_say_moves_it_and_each_layer_and_distance_has_its_own_bias() -> None:
    gate = np.zeros((3, 4, 4), np.float32)
    gate[2] = np.eye(4)
    output = np.zeros((3, 4, 4), np.float32)
    output[2, 0, 3] = 1
    bias = np.zeros((2, 3, 4), np.float32)
    bias[1, 2, 1] = 3
    hybrid = Hybrid(
        PARTS, ROUTER, parameters(gate=gate, output=output, bias=bias, slope=np.zeros(2))
    )
    begin(hybrid, [0])
    scores = observe(hybrid, 0, [2, 1, 1, 0])
    margin = 1 / np.std([2, 1, 1, 0])  # of expert 0 over the second choice
    assert logit(scores[1]) == pytest.approx([0, 0, 0, 0], abs=1e-4)
    assert logit(scores[2]) == pytest.approx([0, 3, 0, margin], abs=1e-3)


def test_a_hidden_unit_below_zero_is_silent() -> None:
    ones = np.ones((3, 4, 4), np.float32)
    for sign, expected in ((1, 4.0), (-1, 0.0)):
        offset = np.full((2, 3, 4), sign, np.float32)
        hybrid = Hybrid(PARTS, ROUTER, parameters(offset=offset, output=ones))
        begin(hybrid, [0])
        assert logit(observe(hybrid, 0, UNDECIDED)[1])[0] == pytest.approx(expected, abs=1e-4)


def test_an_embedding_of_zeros_gives_no_nan() -> None:
    hybrid = Hybrid(PARTS, ROUTER, parameters(token=np.ones((4, 4), np.float32)))
    begin(hybrid, [4])
    assert np.isfinite(observe(hybrid, 0, UNDECIDED)).all()


def test_evenly_spaced_tokens_stand_for_all() -> None:
    first, last = [1.0, 0, 0, 0], [0.0, 0.2, 0.3, 1]
    hybrid = Hybrid(PARTS, ROUTER, parameters(), max_tokens=1)
    begin(hybrid, [0, 1])
    sampled = observe(hybrid, 0, first, last)
    hybrid = Hybrid(PARTS, ROUTER, parameters())
    begin(hybrid, [1])
    alone = observe(hybrid, 0, last)
    np.testing.assert_allclose(sampled, 1 - (1 - alone) ** 2, atol=1e-6)


def test_a_token_behind_the_same_ones_goes_the_way_the_other_went() -> None:
    one, other = [4.0, 3, 0, 0], [0.0, 0, 3, 4]
    hybrid = Hybrid(PARTS, ROUTER, parameters(), window_tokens=2)
    begin(hybrid, [0, 1])
    observe(hybrid, 0, one, one)
    begin(hybrid, [0, 2])  # of these, the first has been seen at the beginning of a request
    scores = observe(hybrid, 0, other, other)
    assert (hybrid.cache.num_hits, hybrid.cache.num_misses) == (1, 3)
    assert (scores[1] >= 0.5).all()
    begin(hybrid, [0, 1])  # as the first time
    assert (observe(hybrid, 0, other, other)[1] >= 0.5).tolist() == [True, True, False, False]


def test_without_windows_gates_are_asked_each_time() -> None:
    hybrid = Hybrid(PARTS, ROUTER, parameters(), window_tokens=0)
    for hidden, expected in (([4.0, 3, 0, 0], [0, 1]), ([0.0, 0, 3, 4], [2, 3])):
        begin(hybrid, [0])
        assert np.flatnonzero(observe(hybrid, 0, hidden)[1] >= 0.5).tolist() == expected
    assert hybrid.cache.num_misses == 0


def test_a_forgotten_request_leaves_no_window() -> None:
    hybrid = Hybrid(PARTS, ROUTER, parameters(), window_tokens=2)
    begin(hybrid, [0])
    hybrid.forget(0)
    begin(hybrid, [1], position=1)
    observe(hybrid, 0, [4.0, 3, 0, 0])
    begin(hybrid, [0, 1])
    observe(hybrid, 0, UNDECIDED, UNDECIDED)
    assert hybrid.cache.num_hits == 0


def test_parameters_survive_being_saved() -> None:
    saved = parameters(token=np.arange(16, dtype=np.float32).reshape(4, 4))
    tensors, sizes = saved.to_tensors()
    assert sizes == SIZES
    read = HybridParameters.from_tensors(tensors, sizes)
    assert all((getattr(read, name) == tensor).all() for name, tensor in tensors.items())


def test_tensors_of_another_shape_are_refused() -> None:
    tensors, sizes = parameters().to_tensors()
    with pytest.raises(ValueError, match="bias"):
        HybridParameters.from_tensors({**tensors, "bias": tensors["bias"][:1]}, sizes)
    with pytest.raises(ValueError, match="slope"):
        HybridParameters.from_tensors({n: t for n, t in tensors.items() if n != "slope"}, sizes)
    with pytest.raises(ValueError, match="where"):
        HybridParameters.from_tensors(tensors, sizes | {"num_layers": 2})
    with pytest.raises(ValueError, match="num_experts"):
        HybridParameters.from_tensors(tensors, {"num_layers": 3})
