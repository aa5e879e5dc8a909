"""What a budget gives: frames by the server's geometry, hits and speed by its residency model."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import COSTS, TINY, budget_of

from sglmoe.decode_graphs import DecodeGraphs
from sglmoe.plan.budgets import Demand, PlanSnapshot, budgets_to_try, plan_budget, tier_ratio
from sglmoe.plan.cost_model import CostModel, Speeds, costs_of
from sglmoe.plan.routing import expert_uses, reference_skew, scaled_to

EVEN = Demand(concurrency=(1,), request_tokens=64, skew=0.0)
NOW = PlanSnapshot(shape=TINY, costs=COSTS, demand=EVEN)


def test_all_experts_beside_a_request_hit_always() -> None:
    plan = plan_budget(NOW, budget_of(17), 0)
    assert plan.geometry is not None
    assert (plan.geometry.num_frames, plan.geometry.frame_bytes) == (17, 1024)
    assert plan.kv_tokens == (17 - 2) * 64  # all frames but those of one token's experts
    (forecast,) = plan.forecasts
    assert (forecast.expert_frames, forecast.hit_ratio, forecast.loads) == (16, 1.0, 0.0)
    assert forecast.tokens_per_second == 1.0


def test_with_half_of_the_experts_even_routing_finds_half_but_for_frames_that_loads_pass_through() -> (
    None
):
    """8 frames for 16 experts. A layer uses 2, so 2 in all are missing, and a frame is lost to passing loads."""
    (forecast,) = plan_budget(NOW, budget_of(9), 0).forecasts
    assert forecast.expert_frames == 8
    assert forecast.loads == pytest.approx(2 + 0.25)
    assert forecast.hit_ratio == pytest.approx(1 - 2.25 / 4)
    # Nothing in host memory: loads come from disk.
    assert forecast.step_seconds == pytest.approx(1 + 2.25 * 8)


def test_host_memory_makes_loads_cheap() -> None:
    """9 frames, so 7 experts are missing, and there are blocks for all of them."""
    (forecast,) = plan_budget(NOW, budget_of(9), 7 * 1024).forecasts
    assert forecast.step_seconds == pytest.approx(1 + 2.25 * 0.5)


def test_more_clients_than_kv_has_room_for_wait() -> None:
    demand = msgspec.structs.replace(EVEN, concurrency=(8,))
    (forecast,) = plan_budget(
        msgspec.structs.replace(NOW, demand=demand), budget_of(5), 0
    ).forecasts
    assert forecast.num_running == 3  # 5 frames, less 2 for one token's experts
    assert forecast.tokens_per_second == pytest.approx(3 / forecast.step_seconds)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (5000, "the dense weights alone take 4.88 KiB"),
        (6000, "raise --memory-budget by at least"),
        (budget_of(2), "2 are needed for experts and 1 for KV cache"),
    ],
)
def test_what_a_server_would_refuse_is_said_in_its_words(budget: int, words: str) -> None:
    plan = plan_budget(NOW, budget, 0)
    assert words in plan.refusal
    assert plan.forecasts == ()


def test_budgets_to_try_end_where_nothing_is_missing() -> None:
    last = budgets_to_try(NOW)[-1]
    assert plan_budget(NOW, last, 0).forecasts[0].hit_ratio == 1.0
    assert plan_budget(NOW, last - 1, 0).forecasts[0].hit_ratio < 1.0


def test_graphs_and_padding_take_of_the_budget_what_they_need() -> None:
    """Frames of 1024 bytes; a page of 16 tokens has 256, and a tensor may begin behind any."""
    graphs = DecodeGraphs(max_rows=4, reserved_bytes=3000)
    now = msgspec.structs.replace(NOW, graphs=graphs)
    enough = budget_of(17) + 3000 + 256
    plain, captured = plan_budget(NOW, budget_of(17), 0), plan_budget(now, enough, 0)
    assert captured.geometry is not None
    assert captured.geometry.padding_pages == 1
    assert captured.geometry.num_frames == 17
    assert captured.forecasts == plain.forecasts
    less = plan_budget(now, enough - 1, 0)
    assert less.geometry is not None
    assert less.geometry.num_frames == 16
    assert budgets_to_try(now) == [budget + 3000 + 256 for budget in budgets_to_try(NOW)]
    assert "and CUDA graphs 2.93 KiB" in plan_budget(now, 8000, 0).refusal


def test_decoding_packed_experts_takes_of_the_budget_too() -> None:
    now = msgspec.structs.replace(NOW, stored_bytes=705)  # there is room for nine, of 720
    assert plan_budget(now, budget_of(17) + 9 * 720, 0).geometry == (
        plan_budget(NOW, budget_of(17), 0).geometry
    )
    assert budgets_to_try(now) == [budget + 9 * 720 for budget in budgets_to_try(NOW)]
    assert "and decoding 6.33 KiB" in plan_budget(now, 8000, 0).refusal


def test_on_a_gpu_the_first_kv_id_is_nobodys() -> None:
    """SGLang's kernels for CUDA store nothing at id 0, whatever is captured."""
    now = msgspec.structs.replace(NOW, on_gpu=True)
    plain, on_gpu = plan_budget(NOW, budget_of(17), 0), plan_budget(now, budget_of(17) + 256, 0)
    assert plain.geometry is not None
    assert on_gpu.geometry is not None
    assert plain.geometry.first_id == 0
    assert on_gpu.geometry.first_id == on_gpu.geometry.page_rows
    assert on_gpu.forecasts == plain.forecasts


@given(st.integers(3, 40), st.floats(0, 8), st.integers(1, 16))
def test_more_memory_never_hits_less(frames: int, skew: float, clients: int) -> None:
    demand = Demand(concurrency=(clients,), request_tokens=16, skew=skew)
    now = msgspec.structs.replace(NOW, demand=demand)
    less, more = (plan_budget(now, budget_of(n), 0).forecasts[0] for n in (frames, frames + 1))
    if less.num_running == more.num_running:
        assert more.hit_ratio >= less.hit_ratio - 1e-6
    assert 0 <= less.hit_ratio <= 1


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40), st.data())
def test_probabilities_are_in_proportion_and_top_k_in_all(
    weights: list[float], data: st.DataObject
) -> None:
    total = data.draw(st.integers(0, len(weights)))
    probability = scaled_to(np.sort(np.array(weights))[::-1], total)
    assert probability.sum() == pytest.approx(total)
    assert probability.min() >= 0
    assert probability.max() <= 1 + 1e-9
    assert (np.diff(probability) <= 1e-9).all()


def test_skew_is_the_logarithm_of_most_used_over_least_used() -> None:
    uses = expert_uses(3, 16, 2, skew=2.0)
    assert uses.probability.shape == (3, 16)
    assert np.log(uses.probability[0, 0] / uses.probability[0, -1]) == pytest.approx(2.0)
    assert np.ptp(expert_uses(1, 16, 2, skew=0.0).probability) == 0


def test_more_requests_are_less_skewed() -> None:
    skews = [reference_skew(n) for n in (0.5, 1, 2, 3.7, 5, 6.7, 18.1, 64)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] == skews[1] > skews[2] > skews[3]
    assert skews[-1] == skews[-2]


def test_tiers_below_frames() -> None:
    """16 experts, 6 in frames, 10 missing: 5 in blocks, and a page cache with room for half of all."""
    assert tier_ratio(TINY, 6, 5, 0) == 0.5
    assert tier_ratio(TINY, 6, 5, 8 * 1024) == 0.75
    assert tier_ratio(TINY, 16, 0, 0) == 1.0


def test_host_memory_holds_more_experts_packed() -> None:
    """7 of the 14 that 2 frames lack, or 10."""
    packed = msgspec.structs.replace(NOW, stored_bytes=720)
    budgets = budget_of(3), budget_of(3) + 9 * 720
    seconds = [
        plan_budget(now, budget, 7 * 1024).forecasts[0].step_seconds
        for now, budget in zip((NOW, packed), budgets, strict=True)
    ]
    assert seconds[1] < seconds[0]


def test_a_step_reads_dense_weights_experts_and_kv_once() -> None:
    speeds = Speeds(
        memory_bytes_per_second=1000,
        link_bytes_per_second=512,
        disk_bytes_per_second=64,
        layer_seconds=0.25,
    )
    costs = costs_of(TINY, speeds, request_tokens=100)
    assert costs == CostModel(
        fixed_seconds=2 * 0.25 + 5.0,
        request_seconds=1.6,
        expert_seconds=1.024,
        load_seconds=2.0,
        disk_seconds=16.0,
    )
    model = costs.model(num_running=2, num_used=4, host_ratio=0.5)
    assert model.step_seconds(2, 3) == pytest.approx(5.5 + 2 * 1.6 + 4 * 1.024 + 3 * 9.0)


def test_two_clients_use_more_experts_than_one_and_share_some() -> None:
    """An expert is used by one with probability 1/4, by either with 7/16: 7 in a step, of which 3.5 are in no frame,
    and as much again is lost as 2 passing frames would have hit."""
    demand = msgspec.structs.replace(EVEN, concurrency=(2,))
    now = msgspec.structs.replace(NOW, demand=demand)
    (forecast,) = plan_budget(now, budget_of(10), 0).forecasts
    assert forecast.expert_frames == 8
    assert forecast.loads == pytest.approx(3.5 + 2 * 7 / 16)
    assert forecast.hit_ratio == pytest.approx(1 - 4.375 / 7)
