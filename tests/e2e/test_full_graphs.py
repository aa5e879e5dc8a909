"""Decode steps that are one graph each, and page experts in without the host: see `captured_decoding`."""

from typing import Any

import numpy as np
import pytest
from captured_decoding import (
    STEPS,
    Budgets,
    decode,
    decode_eagerly,
    decode_plainly,
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


def test_replayed_steps_have_the_bits_of_eager_ones(budgets: Budgets) -> None:
    eager = decode_eagerly(budgets, 2)
    full = run_in_fork(decode, budgets, 2, backend="full")
    assert full.rows == eager.rows  # tokens, log probabilities, routing
    assert full.num_segments == full.memory.lent_steps == STEPS  # one graph each
    assert full.memory.expert_misses > eager.memory.expert_misses / 2
    assert full.memory.expert_hits + full.memory.expert_misses == (
        eager.memory.expert_hits + eager.memory.expert_misses
    )
    assert full.violations == []


def test_experts_that_come_while_a_step_runs_join_it_and_change_no_bit(budgets: Budgets) -> None:
    eager = decode_eagerly(budgets, 2)
    full = run_in_fork(decode, budgets, 2, backend="full", foreseen=eager)
    assert full.rows == eager.rows
    assert full.num_segments == STEPS
    assert full.memory.prefetches_used > 0
    assert full.violations == []


@pytest.mark.parametrize("budgets", ["deepseek_v2"], indirect=True)
def test_rows_that_pad_a_step_are_seen_by_nobody(budgets: Budgets) -> None:
    """Three, in a graph for four."""
    eager = decode_eagerly(budgets, 3)
    padded = run_in_fork(decode, budgets, 3, backend="full")
    assert padded.num_segments == STEPS
    for step, expected in zip(padded.rows, eager.rows, strict=True):
        assert [row.token_id for row in step] == [row.token_id for row in expected]
        assert [row.routed_experts for row in step] == [row.routed_experts for row in expected]
    # Dense layers compute four rows instead of three, which may move last bits, here as with SGLang.
    np.testing.assert_allclose(logprobs_of(padded), logprobs_of(eager), atol=1e-5)
    assert padded.memory.expert_hits + padded.memory.expert_misses == (
        eager.memory.expert_hits + eager.memory.expert_misses
    )
    spoiled = run_in_fork(decode, budgets, 3, backend="full", spoils_padding=True)
    assert spoiled.rows == padded.rows


@pytest.mark.parametrize("budgets", ["qwen3_moe"], indirect=True)
def test_steps_that_could_need_more_frames_than_there_are_ask_the_host(budgets: Budgets) -> None:
    """Four rows may need all experts of each layer, and half of them fit."""
    full = run_in_fork(decode, budgets, 4, backend="full")
    assert full.rows == decode_eagerly(budgets, 4).rows
    assert full.num_segments == full.memory.lent_steps == 0


def test_a_step_that_begins_before_the_last_one_is_known_changes_no_bit(budgets: Budgets) -> None:
    """What it computes is what was sampled on the device; KV has the bits of all that went before."""
    eager = run_in_fork(decode_plainly, budgets, 2, backend="disabled")
    full = run_in_fork(decode_plainly, budgets, 2, backend="full")
    assert full.tokens == eager.tokens
    assert full.logprobs == eager.logprobs
    assert len(full.logprobs) == STEPS
    assert full.kv == eager.kv
    assert full.num_segments == full.memory.lent_steps == STEPS
    assert eager.num_followed == 0
    assert full.num_followed == STEPS - 1
    assert full.memory.expert_misses > eager.memory.expert_misses / 2
    assert full.memory.expert_hits + full.memory.expert_misses == (
        eager.memory.expert_hits + eager.memory.expert_misses
    )
    assert full.violations == []


@pytest.mark.parametrize("budgets", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize("flags", [{"disable_overlap_schedule": True}, {"expert_prefetch": "on"}])
def test_steps_of_whoever_wants_them_one_by_one_follow_none(
    budgets: Budgets, flags: dict[str, Any]
) -> None:
    """SGLang's flag against overlap means this too; letters of prefetches are for one step."""
    full = run_in_fork(decode_plainly, budgets, 2, backend="full", **flags)
    assert full.tokens == run_in_fork(decode_plainly, budgets, 2, backend="disabled").tokens
    assert full.num_followed == 0
    assert full.memory.lent_steps == STEPS
