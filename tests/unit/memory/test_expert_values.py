"""What an expert is worth: 2 layers of 4 experts, 1000 bytes each, 2 ms to load one."""

import numpy as np
import pytest

from sglmoe.memory.arena import Geometry
from sglmoe.memory.eviction import Clock
from sglmoe.memory.expert_values import LastUse, NextUse, UseCount
from sglmoe.memory.prices import Prices
from sglmoe.memory.use_counter import HALF_LIFE_STEPS

GEOMETRY = Geometry(
    num_frames=8,
    frame_bytes=1000,
    expert_bytes=900,
    page_bytes=500,
    page_tokens=4,
    pages_per_frame=2,
    page_rows=16,
)


@pytest.fixture
def values() -> NextUse:
    prices = Prices(GEOMETRY)
    prices.expert_nanoseconds = 2_000_000
    return NextUse((2, 4), prices)


def step(values: NextUse, *layers: list[int]) -> None:
    values.begin_step()
    for layer, experts in enumerate(layers):
        values.use(layer, np.array(experts))


def test_a_byte_saves_its_share_of_a_load_over_the_steps_until_the_next_use(
    values: NextUse,
) -> None:
    # Expert 0 is used in every step; by now nothing else is likely.
    for _ in range(200):
        step(values, [0], [0])
    values.begin_step()
    p = values.probability()
    assert p[:, 0] == pytest.approx(0.985, abs=0.01)
    assert p[:, 1:] == pytest.approx(0, abs=0.01)
    # Layer 0 is half a step away, layer 1 a whole one; after that p says how many steps more.
    expected = 2e-3 / 1000 / ((1 - p[:, 0]) / p[:, 0] + [0.5, 1.0])
    assert values.now()[:, 0] == pytest.approx(expected)
    values.use(0, np.array([0]))
    # Now layer 1 is next, and layer 0 the whole circle away.
    expected = 2e-3 / 1000 / ((1 - p[:, 0]) / p[:, 0] + [1.0, 0.5])
    assert values.now()[:, 0] == pytest.approx(expected)


def test_probability_is_the_share_of_recent_steps(values: NextUse) -> None:
    for number in range(1000):
        step(values, [0, 1] if number % 2 else [0], [2])
    values.begin_step()
    assert values.probability()[0, :2] == pytest.approx([1, 0.5], abs=0.02)
    # A half-life later half of what is known is new.
    for _ in range(HALF_LIFE_STEPS):
        step(values, [3], [2])
    values.begin_step()
    assert values.probability()[0] == pytest.approx([0.5, 0.25, 0, 0.5], abs=0.02)


def test_before_anything_was_used_all_are_alike_but_for_where_they_are(values: NextUse) -> None:
    now = values.now()
    assert (now[0] == now[0, 0]).all()
    assert now[0, 0] > now[1, 0] > 0


def test_asking_for_demand_in_the_middle_of_a_step_changes_nothing(values: NextUse) -> None:
    # The thread that fills host memory asks whenever it likes; a trace is replayed without it.
    for _ in range(3):
        step(values, [0, 1], [2])
    values.begin_step()
    before = values._steps
    demand = values.demand()
    assert values._steps is before
    assert demand[0, 0] > demand[0, 3]


# ------------------------------------------------------------------------------------ what is expected


def likely(*keys: tuple[int, int], others: float = 0.0) -> np.ndarray:
    probabilities = np.full((2, 4), others)
    for key in keys:
        probabilities[key] = 1.0
    return probabilities


def test_an_expected_expert_is_as_far_away_as_its_layer(values: NextUse) -> None:
    for _ in range(200):
        step(values, [0], [0])
    values.begin_step()
    values.expect(-1, likely((0, 2), (1, 3), others=0.25))
    p = values.probability()
    steps = 2e-3 / 1000 / values.now()
    assert steps[0, 2] == pytest.approx(0.5)
    assert steps[1, 3] == pytest.approx(1.0)
    # Not in this step, with a probability of 3/4; then it takes 1 / p steps, as always.
    assert steps[0, 0] == pytest.approx(0.5 + 0.75 / p[0, 0])


def test_what_was_expected_of_a_layer_holds_until_it_is_used(values: NextUse) -> None:
    for _ in range(200):
        step(values, [0], [0])
    values.begin_step()
    without = values.now().copy()
    values.expect(-1, likely((0, 2), (1, 3)))
    values.use(0, np.array([0]))
    now = values.now()
    assert now[1, 3] > now[1, 0], "the layer ahead"
    assert now[0, 0] > now[0, 2], "the next step is another one"
    values.begin_step()
    step(values, [0], [0])
    values.begin_step()
    assert values.now() == pytest.approx(without, rel=0.05)


def test_after_the_last_layer_the_next_step_is_expected(values: NextUse) -> None:
    for _ in range(200):
        step(values, [0], [0])
    values.expect(1, likely((0, 2)))
    assert values.now().argmax() == 2, "layer 1 was used, layer 0 is next"
    values.begin_step()
    assert values.now().argmax() == 2, "this is that step"
    values.use(0, np.array([2]))
    values.begin_step()
    assert values.now().argmax() == 0


def test_lru_has_a_tier_for_what_is_expected() -> None:
    clock = Clock()
    values = LastUse((2, 4), clock)
    for layer, expert in ((0, 0), (1, 0), (1, 1)):
        clock.tick()
        values.use(layer, np.array([expert]))
    values.begin_step()
    values.expect(-1, likely((1, 2), others=0.4))
    assert values.now()[1, 2] == clock.now
    assert values.now()[1, :2].tolist() == [2, 3]
    clock.tick()
    values.use(1, np.array([0]))
    assert values.now()[1].tolist() == [4, 3, 0, 0], "the layer has passed"


def test_lfu_counts_an_expert_by_how_likely_it_is() -> None:
    """FineMoE: the highest 1 / (p * freq) goes first."""
    values = UseCount((2, 4))
    for _ in range(4):
        values.use(0, np.array([0, 1]))
        values.use(1, np.array([0, 1]))
    probabilities = np.full((2, 4), 0.5)
    probabilities[:, 1] = 0.0
    values.expect(-1, probabilities)
    assert values.now()[0].tolist() == [2, pytest.approx(0, abs=1e-5), 0, 0]
    assert values.now()[0, 1] > 0, "it comes before those that were never used"
    values.expect(0, np.ones((2, 4)))
    assert values.now()[:, 0].tolist() == [2, 4], "of layer 0 nothing new was said"
