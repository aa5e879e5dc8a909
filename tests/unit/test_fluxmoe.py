"""FluxMoE's systems in virtual time: steps that can be counted by hand, and orders that must hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.fluxmoe import (
    GPU,
    WHOLE_LAYERS,
    Case,
    Layers,
    adaptation,
    counts_speed,
    move_as_many,
    packed_ratio,
    ring_seconds,
    sampled_steps,
    sglmoe_tokens_per_second,
    tokens_per_second,
)
from sglmoe.plan.model_shape import ModelShape

# 16 layers of 8 experts of 100 MB: 12.8 GB in all, 0.8 a layer, which the link brings in 32 ms and the decoder in 3.2.
SHAPE = ModelShape(
    architecture="tiny",
    num_layers=16,
    num_moe_layers=16,
    num_experts=8,
    top_k=2,
    hidden_size=1,
    inner_size=1,
    expert_bytes=100_000_000,
    dense_bytes=0,
    token_bytes=100_000,
    token_rows=1,
    context_tokens=4096,
    vocab_size=1024,
    item_bytes=2,
)


def case(device_gigabytes: float, num_requests: int) -> Case:
    """100 MB of KV a request."""
    return Case(SHAPE, 1e9 * device_gigabytes, 1000, num_requests)


# -------------------------------------------------------------------------------------------- ring


def test_resident_layers_take_what_computing_takes() -> None:
    assert ring_seconds([1, 2, 3, 4], [0, 0, 0, 0]) == 10


def test_what_is_brought_while_others_compute_is_free() -> None:
    assert ring_seconds([1, 1, 1, 1], [1, 1, 1, 1]) == 4


def test_a_slow_link_is_what_a_step_takes() -> None:
    assert ring_seconds([1, 1, 1, 1], [2, 2, 2, 2]) == 8


def test_a_layer_comes_no_earlier_than_its_blocks_are_free() -> None:
    # The last layer's come when the second one is computed, at 2, and are there at 5; it ends at 6.
    assert ring_seconds([1, 1, 1, 1], [0, 0, 0, 3]) == 6


@given(st.lists(st.tuples(st.floats(0.1, 5), st.floats(0, 5)), min_size=3, max_size=8))
@settings(derandomize=True, database=None)
def test_a_step_takes_as_long_as_either_and_not_as_both(layers: list[tuple[float, float]]) -> None:
    compute, load = zip(*layers, strict=True)
    seconds = ring_seconds(compute, load)
    assert max(sum(compute), sum(load)) - 1e-9 <= seconds <= sum(compute) + sum(load) + 1e-9


# ----------------------------------------------------------------------------------------- systems


def running(system: str, its: Case) -> int:
    return WHOLE_LAYERS[system](its).num_running


def test_what_experts_leave_runs() -> None:
    # 14 GB: 1.2 beside all experts; 14 - 11.2 - 1.6 (the ring) = 1.2 beside 14 layers; packed ones leave 4.5.
    assert packed_ratio() == pytest.approx(0.706, abs=0.001)
    assert running("all resident", case(14, 64)) == 12
    assert running("7/8 resident", case(14, 64)) == 12
    assert running("7/8 packed (FluxMoE-H)", case(14, 64)) == 44
    assert running("balanced (FluxMoE)", case(14, 64)) == 64
    assert running("all resident", case(12.8, 64)) == 0
    assert tokens_per_second(case(12.8, 64), WHOLE_LAYERS["all resident"](case(12.8, 64))) == 0


def test_a_balanced_layer_comes_as_fast_as_decoder_and_link_together() -> None:
    layers = WHOLE_LAYERS["balanced (FluxMoE)"](case(14, 8))
    assert layers.seconds == pytest.approx([0.8 / 275] * 16)
    # 1.6 GB are the ring, 6.4 the KV; of the 0.72 GB that are left every layer gets 45 MB packed, 64 ready.
    layers = WHOLE_LAYERS["balanced (FluxMoE)"](case(8.72, 64))
    assert layers.seconds == pytest.approx([(0.8 - 0.045 / packed_ratio()) / 25] * 16)


@pytest.mark.parametrize("gigabytes", [9, 11, 14, 20])
@pytest.mark.parametrize("num_requests", [1, 8, 64])
def test_balance_is_never_worse_than_whole_layers(gigabytes: float, num_requests: int) -> None:
    its = case(gigabytes, num_requests)
    balanced = tokens_per_second(its, WHOLE_LAYERS["balanced (FluxMoE)"](its))
    assert balanced >= tokens_per_second(its, WHOLE_LAYERS["unbalanced"](its))


def test_sglmoe_waits_for_nothing_where_all_fits() -> None:
    its = case(20, 64)
    assert sglmoe_tokens_per_second(its, 0.0) == pytest.approx(64 / its.compute_seconds(64))
    assert sglmoe_tokens_per_second(its, None) == pytest.approx(64 / its.compute_seconds(64))


def test_routing_is_the_same_for_all_and_uses_every_layer() -> None:
    first, again = (list(sampled_steps(SHAPE, 1)) for _ in range(2))
    assert first == again
    assert all(layers for step in first for layers in step)
    mean = np.mean([len(layer) for step in first for layer in step])
    assert mean == pytest.approx(SHAPE.top_k, rel=0.1)


# -------------------------------------------------------------------------------------- adaptation


def test_experts_leave_one_a_layer_and_no_layer_stands_out() -> None:
    steps = adaptation(SHAPE, 1.0, 16, [1000, 2000, 3000, 4000])
    assert [its.host_experts for its in steps] == sorted(its.host_experts for its in steps)
    assert steps[-1].host_experts > steps[0].host_experts
    for its in steps:
        assert its.after >= its.staggered >= its.concentrated
    # 2000 tokens: one expert of every layer is on the host, 16 times 4 ms; or all of two, 64, and 14 times 3.2 to decode.
    assert steps[1].host_experts == 1
    assert steps[1].staggered / steps[1].concentrated == pytest.approx((64 + 44.8) / 64, rel=0.01)


def test_piled_moves_empty_one_layer_after_the_other() -> None:
    rows = [[3, 1], [3, 1], [3, 1]]
    move_as_many(rows, 4)
    assert rows == [[0, 4], [2, 2], [3, 1]]


def test_a_layer_takes_as_long_as_its_slower_backend() -> None:
    its = case(14, 1)
    decoded = 0.8e9 / GPU.decode_bytes_per_second
    assert counts_speed(its, [[8, 0]] * 16) == tokens_per_second(its, Layers([decoded] * 16, 1))
    loaded = 0.2e9 / GPU.link_bytes_per_second
    assert counts_speed(its, [[6, 2]] * 16) == tokens_per_second(its, Layers([loaded] * 16, 1))
