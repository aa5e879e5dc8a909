"""Who brings which part of a layer: the slowest backend decides when its experts are there."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglmoe.memory.placement import (
    Backend,
    Move,
    layer_seconds,
    plan_counts,
    plan_moves,
    plan_placement,
)

# FluxMoE's setting: a decoder of hundreds of GB/s beside PCIe. With these the link's part is the eighth of Mixtral's
# experts that the paper keeps on the host.
DECODER, LINK = Backend("packed", 175e9), Backend("host", 25e9)
LAYER_BYTES = 2.8e9  # eight experts of Mixtral, 350 MB each


def test_shares_are_as_bandwidths_and_all_end_together() -> None:
    shares = plan_placement([DECODER, LINK], LAYER_BYTES)
    assert shares == pytest.approx((7 / 8, 1 / 8))
    # 2450 MB at 175 GB/s and 350 MB at 25 GB/s: 14 ms each. By the decoder alone it would take 16.
    assert layer_seconds([DECODER, LINK], shares, LAYER_BYTES) == pytest.approx(0.014)
    assert layer_seconds([DECODER, LINK], (1, 0), LAYER_BYTES) == pytest.approx(0.016)


def test_three_tiers() -> None:
    backends = [Backend("packed", 70e9), Backend("host", 25e9), Backend("disk", 5e9)]
    assert plan_placement(backends, LAYER_BYTES) == pytest.approx((0.70, 0.25, 0.05))


def test_what_has_no_room_on_the_device_is_shared_by_the_others() -> None:
    # Room for half a layer. The other half takes 25 and 5 GB/s.
    backends = [Backend("packed", 70e9, 1.4e9), Backend("host", 25e9), Backend("disk", 5e9)]
    assert plan_placement(backends, LAYER_BYTES) == pytest.approx((1 / 2, 5 / 12, 1 / 12))


def test_a_backend_that_is_full_may_fill_another() -> None:
    # 0.5 of the layer fits the device; host memory's part of the rest, 5/12, does not fit either.
    backends = [Backend("packed", 70e9, 1.4e9), Backend("host", 25e9, 0.7e9), Backend("disk", 5e9)]
    assert plan_placement(backends, LAYER_BYTES) == pytest.approx((1 / 2, 1 / 4, 1 / 4))


def test_no_room_is_said() -> None:
    with pytest.raises(ValueError, match="packed, host have no room for a layer"):
        plan_placement([Backend("packed", 1.0, 3.0), Backend("host", 1.0, 2.0)], 6.0)


def test_whole_experts() -> None:
    assert plan_counts([DECODER, LINK], 8, 1.0) == (7, 1)
    # 100 and 30 GB/s: 6.2 and 1.8 of 8. The second one of the link would end at 2/30, the seventh of the decoder at 7/100.
    assert plan_counts([Backend("packed", 100.0), Backend("host", 30.0)], 8, 1.0) == (6, 2)
    assert plan_counts([Backend("packed", 100.0, 5.0), Backend("host", 30.0)], 8, 1.0) == (5, 3)
    with pytest.raises(ValueError, match="no room"):
        plan_counts([Backend("packed", 100.0, 5.5), Backend("host", 30.0, 2.5)], 8, 1.0)


def test_every_layer_moves_one_expert_at_a_time() -> None:
    counts = [[8, 0], [7, 1], [6, 2]]
    assert plan_moves(counts, [6, 2]) == [Move(0, 0, 1), Move(1, 0, 1)]
    assert plan_moves([[7, 1], [6, 2], [6, 2]], [6, 2]) == [Move(0, 0, 1)]
    assert plan_moves([[6, 2]] * 3, [6, 2]) == []


def test_the_fullest_gives_to_the_emptiest() -> None:
    # Two too many are packed, one too many is on disk, host memory lacks three.
    assert plan_moves([[5, 0, 3]], [3, 3, 2]) == [Move(0, 0, 1)]


BACKENDS = st.lists(
    st.builds(
        Backend,
        st.sampled_from(["packed", "host", "disk"]),
        st.floats(1e8, 1e12),
        st.integers(0, 5 * 10**9).map(float) | st.just(float("inf")),
    ),
    min_size=1,
    max_size=4,
).map(lambda its: [*its, Backend("last", 1e9)])


@given(BACKENDS, st.floats(1e6, 5e9), st.data())
@settings(derandomize=True, database=None)
def test_no_other_placement_is_sooner(
    backends: list[Backend], layer_bytes: float, data: st.DataObject
) -> None:
    shares = plan_placement(backends, layer_bytes)
    assert sum(shares) == pytest.approx(1)
    for its, share in zip(backends, shares, strict=True):
        assert share >= 0
        assert share * layer_bytes <= its.layer_bytes * (1 + 1e-9)
    seconds = layer_seconds(backends, shares, layer_bytes)
    source, target = data.draw(st.permutations(range(len(backends))))[:2]
    room = backends[target].layer_bytes / layer_bytes - shares[target]
    moved = data.draw(st.floats(0, 1)) * max(0.0, min(shares[source], room))
    others = [*shares]
    others[source] -= moved
    others[target] += moved
    assert layer_seconds(backends, others, layer_bytes) >= seconds * (1 - 1e-9)


@given(BACKENDS, st.integers(1, 64))
@settings(derandomize=True, database=None)
def test_no_whole_expert_would_be_brought_sooner_by_another(
    backends: list[Backend], num_experts: int
) -> None:
    expert_bytes = 1e8
    counts = plan_counts(backends, num_experts, expert_bytes)
    assert sum(counts) == num_experts
    slowest = max(count / its.bytes_per_second for its, count in zip(backends, counts, strict=True))
    for its, count in zip(backends, counts, strict=True):
        assert count * expert_bytes <= its.layer_bytes
        if (count + 1) * expert_bytes <= its.layer_bytes:
            assert (count + 1) / its.bytes_per_second >= slowest * (1 - 1e-12)


@given(
    st.integers(1, 4).flatmap(
        lambda size: st.tuples(
            st.lists(
                st.lists(st.integers(0, 9), min_size=size, max_size=size), min_size=1, max_size=4
            ),
            st.lists(st.integers(0, 9), min_size=size, max_size=size),
        )
    )
)
@settings(derandomize=True, database=None)
def test_moves_end_and_keep_every_expert(case: tuple[list[list[int]], list[int]]) -> None:
    counts, target = case
    num_experts = sum(target)
    # As many experts in every layer: the last backend has the rest.
    counts = [row for row in counts if sum(row[:-1]) <= num_experts]
    counts = [[*row[:-1], num_experts - sum(row[:-1])] for row in counts]
    rounds = 0
    while moves := plan_moves(counts, target):
        rounds += 1
        assert len({its.layer for its in moves}) == len(moves), "a layer moves two at a time"
        for move in moves:
            counts[move.layer][move.source] -= 1
            counts[move.layer][move.target] += 1
        assert min(min(row) for row in counts) >= 0
    assert all(row == target for row in counts)
    assert rounds <= num_experts
