"""What requests had behind them, and what was predicted then."""

import numpy as np

from sglmoe.prediction.prediction_cache import PredictionCache, TokenWindows
from sglmoe.prediction.predictor import StepTokens


def extend(windows: TokenWindows, *runs: tuple[int, int, list[int]]) -> list[list[int]]:
    """`runs`: owner, first position, token ids."""
    ids = [token for _, _, tokens in runs for token in tokens]
    positions = [start + i for _, start, tokens in runs for i in range(len(tokens))]
    owners = [owner for owner, _, tokens in runs for _ in tokens]
    step = StepTokens(*(np.array(column, np.int32) for column in (ids, positions, owners)))
    rows: list[list[int]] = windows.extend(step).tolist()
    return rows


def test_a_prompts_tokens_have_those_before_them_in_the_window() -> None:
    rows = extend(TokenWindows(3), (7, 0, [11, 12, 13, 14]))
    assert rows == [[-1, -1, 11], [-1, 11, 12], [11, 12, 13], [12, 13, 14]]


def test_windows_go_on_from_step_to_step_for_each_request() -> None:
    windows = TokenWindows(3)
    extend(windows, (7, 0, [11, 12]), (8, 0, [21]))
    assert extend(windows, (8, 1, [22]), (7, 2, [13])) == [[-1, 21, 22], [11, 12, 13]]
    assert extend(windows, (7, 3, [14]), (8, 2, [23])) == [[12, 13, 14], [21, 22, 23]]


def test_what_was_not_shown_is_unknown() -> None:
    windows = TokenWindows(3)
    assert extend(windows, (7, 40, [11])) == [[-1, -1, 11]]  # the rest was found in the KV cache
    assert extend(windows, (7, 0, [1])) == [[-1, -1, 1]]  # preempted: it begins again
    assert extend(windows, (7, 1, [2])) == [[-1, 1, 2]]


def test_a_number_that_was_forgotten_is_a_new_request() -> None:
    windows = TokenWindows(2)
    extend(windows, (7, 0, [11]))
    windows.forget(7)
    windows.forget(8)  # never seen
    assert extend(windows, (7, 1, [12])) == [[-1, 12]]


def test_a_window_of_one_is_the_token() -> None:
    windows = TokenWindows(1)
    assert extend(windows, (7, 0, [11, 12])) == [[11], [12]]
    assert extend(windows, (7, 2, [13])) == [[13]]


def prediction(value: float) -> np.ndarray:
    return np.full((2, 4), value, np.float32)


def test_a_prediction_is_found_for_its_window_and_layer() -> None:
    cache = PredictionCache(4)
    cache.put(0, b"ab", prediction(1))
    cache.put(1, b"ab", prediction(2))
    found = [cache.get(0, b"ab"), cache.get(1, b"ab"), cache.get(0, b"cd")]
    assert [entry if entry is None else entry[0, 0] for entry in found] == [1, 2, None]
    assert (cache.num_hits, cache.num_misses) == (2, 1)


def test_the_one_used_longest_ago_makes_room() -> None:
    cache = PredictionCache(2)
    cache.put(0, b"a", prediction(1))
    cache.put(0, b"b", prediction(2))
    cache.get(0, b"a")
    cache.put(0, b"c", prediction(3))
    assert [cache.get(0, window) is not None for window in (b"a", b"b", b"c")] == [
        True,
        False,
        True,
    ]
