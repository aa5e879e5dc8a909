"""What is fetched next, and in which order: 2 layers of 4 experts, or 3."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sglmoe.memory.prefetch import Wanted
from sglmoe.prediction.prefetch import PrefetchSnapshot, plan_frames, plan_prefetch


def snapshot_of(
    probabilities: list[list[float]],
    *,
    layer: int = -1,
    resident: tuple[tuple[int, int], ...] = (),
    horizon: int = 8,
    num_loads: int = 8,
    min_probability: float = 0.0,
) -> PrefetchSnapshot:
    rows = np.array(probabilities, np.float32)
    is_resident = np.zeros(rows.shape, bool)
    for place in resident:
        is_resident[place] = True
    return PrefetchSnapshot(
        layer=layer,
        probabilities=rows,
        is_resident=is_resident,
        horizon=horizon,
        num_loads=num_loads,
        min_probability=min_probability,
    )


def places(wanted: list[Wanted]) -> list[tuple[int, int]]:
    return [(its.layer, its.expert) for its in wanted]


THREE_LAYERS = [[0.5, 0.2, 0.0, 0.1], [0.9, 0.0, 0.5, 0.0], [0.0, 0.9, 0.0, 0.6]]


def test_the_most_probable_of_the_nearest_layers_go_first() -> None:
    # Priorities: 0.5 0.2 - 0.1 | 0.45 - 0.25 - | - 0.3 - 0.2
    wanted = plan_prefetch(snapshot_of(THREE_LAYERS))
    assert places(wanted) == [(0, 0), (1, 0), (2, 1), (1, 2), (0, 1), (2, 3), (0, 3)]
    assert wanted[1].probability == pytest.approx(0.9)  # not the priority


def test_layers_are_counted_from_the_one_that_runs() -> None:
    # Layer 0 is known, layer 1 is one layer ahead: 0.9 - 0.5 - | - 0.45 - 0.3
    assert places(plan_prefetch(snapshot_of(THREE_LAYERS, layer=0))) == [
        (1, 0),
        (1, 2),
        (2, 1),
        (2, 3),
    ]
    assert plan_prefetch(snapshot_of(THREE_LAYERS, layer=2)) == []


def test_residents_are_left_alone_and_give_their_turn_to_others() -> None:
    wanted = plan_prefetch(snapshot_of(THREE_LAYERS, resident=((0, 0), (2, 1)), num_loads=2))
    assert places(wanted) == [(1, 0), (1, 2)]


def test_nothing_beyond_the_horizon_or_below_the_least_probability() -> None:
    assert places(plan_prefetch(snapshot_of(THREE_LAYERS, horizon=1))) == [(0, 0), (0, 1), (0, 3)]
    # 0.2 is too unlikely; 0.6 isn't, though its priority is 0.2.
    sure = plan_prefetch(snapshot_of(THREE_LAYERS, min_probability=0.3))
    assert places(sure) == [(0, 0), (1, 0), (2, 1), (1, 2), (2, 3)]


def test_of_equals_the_nearer_layer_then_the_lower_number_goes_first() -> None:
    rows = [[0.0, 0.25, 0.0, 0.25], [0.5, 0.0, 0.0, 0.5]]
    assert places(plan_prefetch(snapshot_of(rows, num_loads=3))) == [(0, 1), (0, 3), (1, 0)]


def test_no_loads_may_be_begun() -> None:
    assert plan_prefetch(snapshot_of(THREE_LAYERS, num_loads=0)) == []


# He's ExpertFlow, 3.4: {e12, e13, e14} and {e22, e23} are predicted, four experts fit.
PLEC_EXAMPLE = [[0, 1, 1, 1], [0, 1, 1, 0]]


def test_plec_gives_the_first_layer_three_frames_and_the_second_one() -> None:
    plan = plan_frames(snapshot_of(PLEC_EXAMPLE), num_frames=4)
    assert plan.layer_frames == [3, 1]
    assert places(plan.wanted) == [(0, 1), (0, 2), (0, 3), (1, 1)]


def test_plec_hands_the_frames_of_a_finished_layer_on() -> None:
    after = snapshot_of(PLEC_EXAMPLE, layer=0, resident=((0, 1), (0, 2), (0, 3), (1, 1)))
    plan = plan_frames(after, num_frames=4)
    assert plan.layer_frames == [0, 2]
    assert places(plan.wanted) == [(1, 2)]


def test_plec_splits_by_use_not_by_layer() -> None:
    """Not even layers: a flat layer gets fewer frames than a later one that is sure of itself."""
    rows = [[0.3, 0.3, 0.2, 0.2], [0.9, 0.8, 0.7, 0.0]]
    assert plan_frames(snapshot_of(rows), num_frames=4).layer_frames == [1, 3]


def test_plec_begins_no_more_loads_than_it_may() -> None:
    plan = plan_frames(snapshot_of(PLEC_EXAMPLE, num_loads=2), num_frames=4)
    assert plan.layer_frames == [3, 1]
    assert places(plan.wanted) == [(0, 1), (0, 2)]


ROWS = arrays(np.float32, (3, 4), elements=st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]))


@settings(deadline=None)
@given(
    ROWS,
    arrays(bool, (3, 4)),
    st.integers(-1, 2),
    st.integers(1, 4),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.2]),
)
def test_the_plan_is_the_sorted_list_of_what_qualifies(
    rows: np.ndarray,
    is_resident: np.ndarray,
    layer: int,
    horizon: int,
    num_loads: int,
    least: float,
) -> None:
    qualified = [
        (-rows[row, expert] / (row - layer), row, expert)
        for row in range(layer + 1, min(3, layer + 1 + horizon))
        for expert in range(4)
        if rows[row, expert] > 0 and rows[row, expert] >= least and not is_resident[row, expert]
    ]
    snapshot = PrefetchSnapshot(layer, rows, is_resident, horizon, num_loads, least)
    expected = [(row, expert) for _, row, expert in sorted(qualified)][:num_loads]
    assert places(plan_prefetch(snapshot)) == expected


def test_a_large_model_is_planned_in_a_fraction_of_a_layer() -> None:
    """48 layers of 128 experts took 80 us where this was written; a layer takes a millisecond."""
    random = np.random.default_rng(0)
    rows = random.random((48, 128), np.float32)
    snapshot = PrefetchSnapshot(-1, rows, random.random((48, 128)) < 0.25, 47, 32, 0.05)
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        plan_prefetch(snapshot)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1e-3
