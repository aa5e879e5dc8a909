"""Decode steps out of graphs that break at each MoE layer: see `captured_decoding`."""

import numpy as np
import pytest
from captured_decoding import (
    NUM_FRAMES,
    SIZES,
    STEPS,
    Budgets,
    counters,
    decode,
    decode_eagerly,
    logprobs_of,
    make_budgets,
)
from forking import run_in_fork

pytestmark = pytest.mark.usefixtures("preloaded")


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen2_moe", "deepseek_v2"])
def budgets(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, preloaded: None
) -> Budgets:
    return make_budgets(request.param, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("num_requests", [1, 4, 5])
def test_replayed_steps_have_the_bits_of_eager_ones(budgets: Budgets, num_requests: int) -> None:
    eager = decode_eagerly(budgets, num_requests)
    captured = run_in_fork(decode, budgets, num_requests)
    assert captured.rows == eager.rows  # tokens, log probabilities, routing
    assert counters(captured) == counters(eager)
    assert captured.memory.expert_misses > 0
    assert captured.geometry.num_frames == eager.geometry.num_frames == NUM_FRAMES
    assert captured.geometry.padding_pages == 1
    assert captured.violations == []
    is_captured = num_requests <= max(SIZES)
    assert captured.num_segments == is_captured * STEPS * (captured.num_layers + 1)
    assert eager.num_segments == 0


def test_rows_that_pad_a_step_are_seen_by_nobody(budgets: Budgets) -> None:
    eager = decode_eagerly(budgets, 3)
    padded = run_in_fork(decode, budgets, 3)
    assert padded.num_segments == STEPS * (padded.num_layers + 1)
    for step, expected in zip(padded.rows, eager.rows, strict=True):
        assert [row.token_id for row in step] == [row.token_id for row in expected]
        assert [row.routed_experts for row in step] == [row.routed_experts for row in expected]
    # Dense layers compute four rows instead of three, which may move last bits, here as with SGLang.
    np.testing.assert_allclose(logprobs_of(padded), logprobs_of(eager), atol=1e-5)
    assert counters(padded) == counters(eager)
    assert padded.violations == []
    spoiled = run_in_fork(decode, budgets, 3, spoils_padding=True)
    assert spoiled.rows == padded.rows


def test_a_step_that_fails_in_a_break_leaves_graphs_that_can_be_replayed(budgets: Budgets) -> None:
    eager = decode_eagerly(budgets, 2)
    captured = run_in_fork(decode, budgets, 2, fails=True)
    assert captured.rows == eager.rows
    assert captured.violations == []
