"""A step at a time, in any company, gives what the model gives of a request as a whole."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sglmoe.prediction import routing_path
from sglmoe.prediction.predictor import StepTokens
from sglmoe.prediction.routing_path import RoutingPath, from_saved, to_saved
from sglmoe.prediction.routing_path_model import Dimensions, RoutingPathModel, bucket_of

TINY = Dimensions(
    num_layers=2,
    num_experts=4,
    vocab_size=11,
    d_model=8,
    d_ff=16,
    d_kv=4,
    num_heads=2,
    num_blocks=2,
    prompt_tokens=5,
    window_tokens=3,
)
# Of single precision, sums in another order.
TOLERANCE = 1e-5

PROMPT = [1, 2, 3, 4]
GENERATED = [5, 6, 7, 8, 9, 10, 1]  # longer than twice the window

Run = tuple[int, int, Sequence[int]]  # request, position of the first, token ids


@pytest.fixture
def model() -> RoutingPathModel:
    """Untrained, and such that each part of it matters."""
    torch.manual_seed(0)
    model = RoutingPathModel(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def step(*runs: Run) -> StepTokens:
    lengths = [len(tokens) for _, _, tokens in runs]
    return StepTokens(
        np.array([token for _, _, tokens in runs for token in tokens], np.int32),
        np.concatenate([np.arange(at, at + len(tokens)) for _, at, tokens in runs]).astype(
            np.int32
        ),
        np.repeat([owner for owner, _, _ in runs], lengths).astype(np.int32),
    )


def predict(predictor: RoutingPath, *runs: Run) -> npt.NDArray[np.float32]:
    predictor.begin_step(step(*runs))
    return predictor.scores()


def whole(
    model: RoutingPathModel, prompt: Sequence[int], generated: Sequence[int]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Probabilities by the model alone: of the prompt's tokens, of the generated ones; [T, layers, experts]."""
    length = torch.tensor([len(prompt)])
    with torch.inference_mode():
        states = model.encode(torch.tensor([prompt]), length)
        both = states, model.decode(torch.tensor([generated]), states, length)
        prompts, later = (torch.sigmoid(model.head(its))[0].numpy() for its in both)
    return prompts.reshape(-1, 2, 4), later.reshape(-1, 2, 4)


def any_of(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    unused: npt.NDArray[np.float32] = np.prod(1 - probabilities, axis=0)
    return 1 - unused


def close(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> bool:
    return np.allclose(a, b, atol=TOLERANCE, rtol=0)


def test_token_by_token_equals_all_at_once(model: RoutingPathModel) -> None:
    predictor = RoutingPath(model)
    prompts, generated = whole(model, PROMPT, GENERATED)
    assert close(predict(predictor, (7, 0, PROMPT)), any_of(prompts))
    for place, token in enumerate(GENERATED):
        assert close(predict(predictor, (7, 4 + place, [token])), generated[place])


def test_a_batch_of_different_lengths_equals_each_request_alone(model: RoutingPathModel) -> None:
    # They come at different times, with prompts of 4, 1 and 3 tokens, and one sits out a step.
    together, alone = RoutingPath(model), [RoutingPath(model) for _ in range(3)]
    steps: list[list[Run]] = [
        [(0, 0, PROMPT)],
        [(0, 4, [5]), (1, 0, [9])],
        [(0, 5, [6]), (1, 1, [2]), (2, 0, [3, 3, 8])],
        [(2, 3, [7]), (0, 6, [7])],
        [(1, 2, [4]), (2, 4, [1]), (0, 7, [8])],
        [(0, 8, [9]), (1, 3, [0]), (2, 5, [2])],
    ]
    for runs in steps:
        expected = any_of(np.stack([predict(alone[run[0]], run) for run in runs]))
        assert close(predict(together, *runs), expected)


def test_requests_may_come_in_any_order(model: RoutingPathModel) -> None:
    predictor = RoutingPath(model)
    for owner in range(4):
        predict(predictor, (owner, 0, [owner, 9]))
    expected = [whole(model, [owner, 9], [5 + owner])[1][0] for owner in range(4)]
    scores = predict(predictor, *[(owner, 2, [5 + owner]) for owner in (0, 2, 1, 3)])
    assert close(scores, any_of(np.stack(expected)))


def test_prompt_and_earlier_tokens_matter_and_none_beyond_the_window(
    model: RoutingPathModel,
) -> None:
    _, generated = whole(model, PROMPT, GENERATED)
    _, other_prompt = whole(model, [2, 2, 3, 4], GENERATED)
    _, other_token = whole(model, PROMPT, [0, *GENERATED[1:]])
    assert not close(generated, other_prompt)
    # Two blocks with a window of 3: at second hand a token is seen by the four that follow it.
    changed = [not close(a, b) for a, b in zip(generated, other_token, strict=True)]
    assert changed == [True] * 5 + [False] * 2


def test_only_the_end_of_a_long_prompt_is_read(model: RoutingPathModel) -> None:
    predictor = RoutingPath(model)
    prompts, generated = whole(model, [4, 5, 6, 7, 8], [9])
    assert close(predict(predictor, (0, 0, [1, 2, 3, 4, 5, 6, 7, 8])), any_of(prompts))
    assert close(predict(predictor, (0, 8, [9])), generated[0])


def test_a_prompt_in_chunks_becomes_the_same_prompt(model: RoutingPathModel) -> None:
    predictor = RoutingPath(model)
    prompts, generated = whole(model, PROMPT, [5])
    predict(predictor, (0, 0, [1, 2]))
    assert close(predict(predictor, (0, 2, [3, 4])), any_of(prompts[2:]))
    assert close(predict(predictor, (0, 4, [5])), generated[0])


def test_a_chunk_of_one_token_is_lost(model: RoutingPathModel) -> None:
    predictor = RoutingPath(model)
    _, generated = whole(model, [1, 2, 4, 5], [6])
    for run in [(0, 0, [1, 2]), (0, 2, [3]), (0, 3, [4, 5])]:
        predict(predictor, run)
    assert close(predict(predictor, (0, 5, [6])), generated[0])


def test_of_a_cached_prefix_nothing_is_known(model: RoutingPathModel) -> None:
    predictor = RoutingPath(model)
    _, generated = whole(model, PROMPT, [5])
    predict(predictor, (0, 64, PROMPT))
    assert close(predict(predictor, (0, 68, [5])), generated[0])


def test_a_request_that_starts_over_is_read_again(model: RoutingPathModel) -> None:
    # Preempted after two tokens, it comes back with the first of them in its prompt.
    predictor = RoutingPath(model)
    _, generated = whole(model, [1, 2, 5], [6])
    for run in [(0, 0, [1, 2]), (0, 2, [5]), (0, 3, [6]), (0, 0, [1, 2, 5])]:
        predict(predictor, run)
    assert close(predict(predictor, (0, 3, [6])), generated[0])


def test_tokens_of_a_step_nobody_told_of_are_gone_without(model: RoutingPathModel) -> None:
    predictor = RoutingPath(model)
    _, generated = whole(model, PROMPT, [5, 7])
    for run in [(0, 0, PROMPT), (0, 4, [5])]:
        predict(predictor, run)
    assert close(predict(predictor, (0, 6, [7])), generated[1])


def test_a_number_given_again_has_nothing_of_the_request_before(model: RoutingPathModel) -> None:
    predictor = RoutingPath(model)
    for run in [(0, 0, [9, 8, 7, 6, 5]), (0, 5, [4]), (0, 6, [3])]:
        predict(predictor, run)
    predictor.forget(0)
    prompts, generated = whole(model, [1, 2], [5])
    assert close(predict(predictor, (0, 0, [1, 2])), any_of(prompts))
    assert close(predict(predictor, (0, 2, [5])), generated[0])


def test_forgotten_requests_leave_their_rows_to_others(model: RoutingPathModel) -> None:
    predictor = RoutingPath(model)
    for owner in range(50):
        predict(predictor, (owner, 0, PROMPT))
        predictor.forget(owner)
    assert predictor.num_rows == 4


def test_of_requests_nobody_forgets_the_one_idle_longest_goes(
    model: RoutingPathModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing_path, "MAX_REQUESTS", 4)
    predictor = RoutingPath(model)
    for owner in range(4):
        predict(predictor, (owner, 0, PROMPT))
    predict(predictor, (0, 4, [5]))
    predict(predictor, (4, 0, PROMPT))  # takes the place of 1
    assert predictor.num_rows == 4
    assert close(predict(predictor, (0, 5, [6])), whole(model, PROMPT, [5, 6])[1][1])
    assert close(predict(predictor, (1, 4, [5])), whole(model, [5], [6])[0][0])


def test_ids_beyond_the_vocabulary_do_no_harm(model: RoutingPathModel) -> None:
    predictor = RoutingPath(model)
    prompts, _ = whole(model, [0, 2], [0])
    assert close(predict(predictor, (0, 0, [1_000_000, 2])), any_of(prompts))


def test_a_step_of_no_tokens_uses_nothing(model: RoutingPathModel) -> None:
    assert predict(RoutingPath(model), (0, 0, [])).tolist() == np.zeros((2, 4)).tolist()


def test_saved_tensors_give_the_same_predictions_in_half_precision(model: RoutingPathModel) -> None:
    settings, tensors = to_saved(model)
    loaded, original = from_saved(settings, tensors), RoutingPath(model)
    difference = predict(loaded, (0, 0, PROMPT)) - predict(original, (0, 0, PROMPT))
    assert np.abs(difference).max() < 0.05
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    ("distance", "both_ways", "bucket"),
    [
        # Half of 32 for a distance each, then 16 + 16 * log(d / 16) / log(128 / 16).
        (15, False, 15),
        (20, False, 17),
        (127, False, 31),
        (500, False, 31),
        (-3, False, 0),
        # Half of 16 for a distance each, then 8 + 8 * log(d / 8) / log(128 / 8); 16 more ahead.
        (7, True, 7),
        (20, True, 10),
        (-20, True, 26),
    ],
)
def test_distances_fall_into_the_buckets_of_t5(distance: int, both_ways: bool, bucket: int) -> None:
    assert bucket_of(torch.tensor([distance]), both_ways=both_ways).tolist() == [bucket]
