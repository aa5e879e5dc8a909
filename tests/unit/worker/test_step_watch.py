"""What steps cost, and the prices that follow. Steps are made up: what memory says, and how long it took."""

from array import array

import msgspec
import pytest

from sglmoe.memory.step_times import StepTimes
from sglmoe.protocol import MemorySnapshot, NewRequest, StepCosts
from sglmoe.worker.request import BatchRow, WorkerRequest
from sglmoe.worker.step_watch import Price, StepCost, StepKind, StepWatch

NOTHING = MemorySnapshot(*[0] * sum(f.required for f in msgspec.structs.fields(MemorySnapshot)))


def request(rid: str) -> WorkerRequest:
    spec = NewRequest(
        rid=rid,
        prompt_ids=array("i", range(10)).tobytes(),
        output_ids=b"",
        sampling=b"",
        max_new_tokens=9,
        namespace="",
        logprobs=None,
        routed_experts_start=None,
        requires_reasoning=False,
    )
    return WorkerRequest(spec)


class Watched:
    """Steps and what is learned of them."""

    def __init__(self) -> None:
        self.times = StepTimes()
        self.watch = StepWatch(
            self.times, Price(expert_nanoseconds=1000, token_nanoseconds=2000), num_experts=10
        )
        self.snapshot = NOTHING

    def step(self, kind: StepKind, *, seconds: float, misses: int = 0) -> StepCost:
        """Each miss takes 5 ms of the step, and keeps the link busy for 4."""
        self.snapshot = msgspec.structs.replace(
            self.snapshot,
            expert_misses=self.snapshot.expert_misses + misses,
            stall_seconds=self.snapshot.stall_seconds + 0.005 * misses,
            load_seconds=self.snapshot.load_seconds + 0.004 * misses,
        )
        return self.watch.step_done(kind, self.snapshot, seconds)


def test_rows_that_have_sampled_decode_and_others_prefill() -> None:
    """To be asked before the step: it appends a token, and the same rows are of the past then."""
    running, fresh = request("running"), request("fresh")
    running.tokens.append(99)
    rows = [BatchRow.of(running, 10, 11), BatchRow.of(fresh, 4, 10)]
    assert StepKind.of(rows) == ([running], 6)
    assert StepKind.of(rows).num_decoding == 0, "a mixed step is no decode step"
    assert StepKind.of(rows[:1]).num_decoding == 1


def test_waiting_for_experts_is_no_computing() -> None:
    its = Watched()
    decode = StepKind([request("a")], 0)
    assert its.step(decode, seconds=0.02, misses=2) == pytest.approx(
        (0.02, 0.01, 2, 0, 0, 0.008, 0)
    )
    assert its.step(decode, seconds=0.01) == pytest.approx((0.01, 0, 0, 0, 0, 0, 0))
    assert its.times.load_seconds == pytest.approx(0.005)
    assert its.times.link_seconds == pytest.approx(0.004)
    assert its.times.model is not None
    assert its.times.model.compute_seconds(1) == pytest.approx(0.01)


def test_what_is_decoded_from_the_arena_is_a_part_of_a_load() -> None:
    """Ten misses, five of them decoded in a fifth of the time: as long as six loads."""
    times = StepTimes()
    watch = StepWatch(times, Price(1, 1), num_experts=10, decode_ratio=lambda: 0.2)
    for step in range(1, 3):
        snapshot = msgspec.structs.replace(
            NOTHING,
            expert_misses=10 * step,
            packed_hits=5 * step,
            stall_seconds=0.030 * step,
            load_seconds=0.024 * step,
        )
        cost = watch.step_done(StepKind([request("a")], 0), snapshot, 0.1)
    assert (cost.misses, cost.num_loads) == (10, pytest.approx(6))
    assert times.load_seconds == pytest.approx(0.005)
    assert times.link_seconds == pytest.approx(0.004)


def test_prefills_teach_what_a_token_costs() -> None:
    its = Watched()
    its.step(StepKind([], 100), seconds=0.22, misses=4)
    assert its.times.prefill_token_seconds == pytest.approx(0.002)
    its.step(StepKind([request("a")], 99), seconds=0.2)
    assert its.times.prefill_token_seconds == pytest.approx(0.002), "who decodes is a token more"


def test_a_price_is_new_once_it_was_measured_and_when_it_has_moved_by_a_tenth() -> None:
    its = Watched()
    assert its.watch.new_price() is None, "nothing was measured"
    its.step(StepKind([], 100), seconds=0.2)
    assert its.watch.new_price() == Price(1000, 2_000_000)
    its.step(StepKind([], 100), seconds=0.21)
    assert its.watch.new_price() is None
    its.step(StepKind([], 100), seconds=0.3, misses=1)
    price = its.watch.new_price()
    assert price is not None
    assert price.expert_nanoseconds == 5_000_000
    assert price.token_nanoseconds > 2_200_000


class TestCosts:
    """Of ten experts, each 5 ms; what a pass over prompts pays for them."""

    def passes(self, its: Watched, *misses: int, resident: int) -> StepCosts:
        for number in misses:
            its.step(StepKind([], 100), seconds=0.2 + 0.005 * number, misses=number)
        return its.watch.costs(msgspec.structs.replace(its.snapshot, expert_frames=resident))

    def test_before_anything_was_measured_nothing_is_known(self) -> None:
        assert Watched().watch.costs(NOTHING) == StepCosts()

    def test_a_pass_loads_what_the_last_ones_did(self) -> None:
        costs = self.passes(Watched(), 6, 6, 6, resident=2)
        assert costs.stream_seconds == pytest.approx(0.03)
        assert costs.token_seconds == pytest.approx(0.002)

    def test_but_no_more_than_is_absent(self) -> None:
        """The first pass of a server has loaded all, and all have stayed."""
        assert self.passes(Watched(), 10, resident=10).stream_seconds == 0
        assert self.passes(Watched(), 10, resident=7).stream_seconds == pytest.approx(0.015)

    def test_experts_that_nobody_uses_are_forgotten(self) -> None:
        costs = self.passes(Watched(), 10, *[0] * 40, resident=7)
        assert costs.stream_seconds < 0.0001

    def test_a_decode_step_has_a_fixed_part_with_its_loads_and_rows(self) -> None:
        its = Watched()
        for number in range(1, 200):
            rows = [request(str(i)) for i in range(1 + number % 4)]
            its.step(StepKind(rows, 0), seconds=0.02 + 0.001 * len(rows) + 0.005 * 2, misses=2)
        costs = its.watch.costs(its.snapshot)
        assert costs.row_seconds == pytest.approx(0.001)
        assert costs.decode_seconds == pytest.approx(0.03)
