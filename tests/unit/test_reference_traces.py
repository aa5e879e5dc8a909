"""The traces that are committed for comparing policies, and that the tools still read them."""

from pathlib import Path

import numpy as np
import pytest

from eval.replay import Link, replay_experts, replay_whole
from sglmoe.prediction.trace import Trace, load_trace

FOLDER = Path(__file__).parents[2] / "eval" / "traces"
NAMES = ("python-1", "prose-1", "arithmetic-1", "recall-1", "mixed-8", "mixed-32", "turns-4")
LINK = Link(bytes_per_second=1e9, latency_seconds=1e-5, layer_seconds=1e-4)


@pytest.fixture(params=NAMES)
def trace(request: pytest.FixtureRequest) -> Trace:
    return load_trace(FOLDER / f"{request.param}.npz")


def test_each_is_of_the_bundled_model_under_pressure(trace: Trace) -> None:
    info = trace.info
    assert (info.num_layers, info.num_experts, info.top_k) == (6, 32, 4)
    assert info.totals.experts_evicted > 0
    assert trace.num_steps >= 100


def test_the_experts_taken_are_the_routers_first_choices(trace: Trace) -> None:
    taken = np.take_along_axis(trace.probabilities, trace.expert_ids.astype(np.int64), axis=2)
    first = np.sort(trace.probabilities, axis=2)[:, :, -trace.info.top_k :]
    np.testing.assert_array_equal(np.sort(taken, axis=2), first)


def test_cost_aware_is_between_the_oracle_and_lru(trace: Trace) -> None:
    used = {
        (layer, expert)
        for step in trace.experts_by_layer()
        for layer, experts in enumerate(step)
        for expert in experts
    }
    lru, by_cost, oracle = (
        replay_experts(trace, 96, LINK, policy) for policy in ("lru", "cost-aware", "oracle")
    )
    assert oracle.misses <= by_cost.misses < lru.misses
    # With room for all experts each is loaded once.
    assert replay_experts(trace, 192, LINK, "lru").misses == len(used)


def test_the_servers_counters_are_reproduced(trace: Trace) -> None:
    """Memory that decides otherwise than when they were recorded asks for new ones."""
    assert replay_whole(trace) == trace.info.totals
