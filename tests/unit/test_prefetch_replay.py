"""Prefetching in virtual time: 2 layers of 4 experts; an expert takes 1 s, as a layer's two halves do."""

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.prefetch_replay import (
    PrefetchReplay,
    belady,
    main,
    released_after,
    replay,
)
from eval.prefetch_report import Outcome, save, stall_share
from eval.replay import Link, replay_experts
from eval.replay_predictors import BOUNDS, Foreseen, Material, uses_of, with_errors
from eval.replay_prefetcher import POLICIES, Planner, Setting
from eval.simulated_link import LinkSpeed, SimulatedLink
from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Geometry
from sglmoe.memory.experts import ABSENT
from sglmoe.memory.manager import MemoryManager
from sglmoe.prediction.forecast import Forecast
from sglmoe.prediction.predictor import LayerRouting, ModelParts, StepTokens
from sglmoe.prediction.prefetch import PrefetchSnapshot, plan_frames
from sglmoe.prediction.router import Router
from sglmoe.prediction.trace import FORMAT_VERSION, Kind, Totals, Trace, TraceInfo
from sglmoe.worker.predictors import Sources

GEOMETRY = Geometry(
    num_frames=8,
    frame_bytes=1000,
    expert_bytes=1000,
    page_bytes=500,
    page_tokens=4,
    pages_per_frame=2,
    page_rows=16,
)
SETTING = Setting(
    num_frames=8,
    expert_bytes=1000,
    speed=LinkSpeed(bytes_per_second=1000, latency_seconds=0, chunk_bytes=250),
    layer_seconds=2.0,
    attention_ratio=0.5,
    applies_late=False,
    min_probability=0.05,
    horizon_layers=None,
)


def trace_of(steps: list[list[list[int]]], operations: list[list[int]] | None = None) -> Trace:
    """One token a step; its experts by layer."""
    expert_ids = np.array(steps, np.uint8)
    num_steps, num_layers, top_k = expert_ids.shape
    info = TraceInfo(
        version=FORMAT_VERSION,
        model="tiny",
        num_layers=num_layers,
        num_experts=4,
        top_k=top_k,
        geometry=GEOMETRY,
        floor_frames=1,
        policy=MemoryPolicy.LRU,
        expert_ratio=0.0,
        totals=Totals(*[0] * len(Totals.__struct_fields__)),
        namespaces=[],
    )
    return Trace(
        info=info,
        operations=np.array(operations or np.empty((0, 5)), np.int32),
        request_tokens=np.empty(0, np.int32),
        request_bounds=np.zeros(1, np.int64),
        token_ids=np.zeros(num_steps, np.int32),
        positions=np.zeros(num_steps, np.int32),
        owners=np.zeros(num_steps, np.int32),
        expert_ids=expert_ids,
        probabilities=np.full((num_steps, num_layers, 4), 0.25, np.float16),
        step_bounds=np.arange(num_steps + 1),
        step_seconds=np.zeros(num_steps, np.float32),
    )


ONE_STEP = trace_of([[[0], [3]]])
TWO_STEPS = trace_of([[[0], [3]], [[1], [2]]])


class Made(Material):
    """Of a made-up trace."""

    def __init__(self, trace: Trace):
        self.trace = trace
        num_layers, top_k = trace.expert_ids.shape[1:]
        parts = ModelParts(num_layers, 4, top_k, lambda ids: np.ones((len(ids), 3), np.float32))
        router = Router(np.ones((num_layers, 4, 3), np.float32), top_k)
        self.sources = Sources(parts, router, vocab_size=8, folder=Path("none"))
        self.gate_inputs = np.ones((len(trace.token_ids), num_layers, 3), np.float32)


def play(trace: Trace, setting: Setting, policy: str, predictor: str | None) -> Outcome:
    return replay(Made(trace), setting, policy, predictor)


def new_run(
    trace: Trace, setting: Setting, policy: str, forecast: Forecast
) -> tuple[PrefetchReplay, Planner]:
    run = PrefetchReplay(trace, setting, POLICIES[policy].memory)
    planner = Planner(POLICIES[policy], setting, forecast, memory=run.memory, link=run.link)
    run.prefetcher = planner
    return run, planner


def test_on_demand_every_load_is_waited_for() -> None:
    its = play(TWO_STEPS, SETTING, "lru", None)
    # Four layers of 2 s, four loads of 1 s.
    assert (its.hits, its.misses, its.seconds, its.stall_seconds) == (0, 4, 12.0, 4.0)
    assert its.stall_ratio == pytest.approx(1 / 3)
    assert its.idle_ratio == pytest.approx(2 / 3)
    assert its.bytes_moved == 4000


def test_the_first_half_of_a_layer_is_time_enough_for_an_expert() -> None:
    its = play(TWO_STEPS, SETTING, "cost-aware+prefetch", "oracle")
    assert (its.hits, its.misses, its.seconds, its.stall_seconds) == (4, 0, 8.0, 0.0)
    assert (its.prefetches_begun, its.prefetches_used, its.prefetches_wasted) == (4, 4, 0)
    assert its.bytes_moved == 4000


def test_what_comes_late_is_waited_for_and_counts_as_a_miss() -> None:
    slow = msgspec.structs.replace(SETTING, speed=LinkSpeed(400, 0, 250))  # 2.5 s for an expert
    its = play(ONE_STEP, slow, "cost-aware+prefetch", "oracle")
    # Layer 0: 1 s, then 1.5 s for the rest of its expert. Layer 1's had 2 s: half a second is left.
    assert (its.hits, its.misses, its.prefetches_late) == (0, 2, 2)
    assert its.stall_seconds == pytest.approx(1.5 + 0.5)


def test_plans_that_wait_for_the_end_of_a_layer_lose_its_time() -> None:
    trace = trace_of([[[0, 1], [2, 3]]])
    early = msgspec.structs.replace(SETTING, attention_ratio=0.0)
    late = msgspec.structs.replace(early, applies_late=True)
    # Nothing can be there for layer 0: 2 s. Its own 2 s are enough for both of layer 1, or lost.
    assert play(trace, early, "cost-aware+prefetch", "oracle").stall_seconds == 2.0
    assert play(trace, late, "cost-aware+prefetch", "oracle").stall_seconds == 4.0


def test_wrong_forecasts_cost_time_and_change_nothing_else() -> None:
    trace = trace_of([[[0], [3]], [[1], [2]], [[0], [3]]] * 5)
    setting = msgspec.structs.replace(SETTING, num_frames=3)
    wrong = play(trace, setting, "cost-aware+prefetch", "adversarial_believed")
    assert wrong.hits + wrong.misses == 30
    assert wrong.prefetches_used < wrong.prefetches_wasted
    assert wrong.compute_seconds == 60.0
    # Who is never right is not believed for long.
    calibrated = play(trace, setting, "cost-aware+prefetch", "adversarial")
    assert calibrated.prefetches_begun == 0


def test_a_layer_that_fits_in_no_wave_is_computed_once() -> None:
    trace = trace_of([[[0, 1, 2], [0, 1, 3]]] * 4)
    setting = msgspec.structs.replace(SETTING, num_frames=2)
    its = play(trace, setting, "cost-aware+prefetch", "oracle")
    assert its.hits + its.misses == 24
    assert its.compute_seconds == pytest.approx(16.0)


def test_a_layer_in_waves_is_observed_once_when_the_last_one_begins() -> None:
    trace = trace_of([[[0, 1, 2], [0, 1, 3]]])
    setting = msgspec.structs.replace(SETTING, num_frames=2)
    predictor = Listening(trace, knows_next_step=False)
    forecast = Forecast(predictor, num_layers=2, calibration=None)
    new_run(trace, setting, "cost-aware+prefetch", forecast)[0].run()
    assert predictor.layers == [0, 1]


class Listening(Foreseen):
    def __init__(self, trace: Trace, *, knows_next_step: bool) -> None:
        super().__init__(trace, knows_next_step=knows_next_step)
        self.layers: list[int] = []

    def observe(self, routing: LayerRouting) -> None:
        self.layers.append(routing.layer)
        super().observe(routing)


def test_what_is_expected_stays() -> None:
    # Two frames: 0 and 0' of the layers, then 1' has to come. Layer 0's expert was used as often as
    # layer 1's, and comes first in the circle; but this step is known not to use either again, and the
    # next one to use 1 and 1': only who is told evicts well.
    trace = trace_of([[[0], [0]], [[0], [1]], [[1], [1]]])
    setting = msgspec.structs.replace(SETTING, num_frames=2)
    assert play(trace, setting, "cost-aware", None).hits == 1
    assert play(trace, setting, "cost-aware+expect", "oracle").hits == 2


def test_what_has_arrived_or_is_on_its_way_is_not_planned_again() -> None:
    trace = trace_of([[[0, 1], [2, 3]]])
    # 2 s for an expert, so two may be on their way; the third can be begun once the first is there.
    setting = msgspec.structs.replace(SETTING, speed=LinkSpeed(500, 0, 250), horizon_layers=2)
    forecast = Forecast(Foreseen(trace, knows_next_step=False), num_layers=2, calibration=None)
    run, planner = new_run(trace, setting, "cost-aware+prefetch", forecast)
    run.memory.begin_step()
    planner.begin_step(StepTokens(*[np.zeros(1, np.int32)] * 3))
    assert run.link.num_queued == 2
    run.link.compute(2.0)
    planner.look_ahead(-1, num_pinned=0)
    assert run.link.num_queued == 2
    assert run.memory.snapshot(0).prefetches_begun == 3


def test_the_servers_advisor_is_asked_as_in_the_server() -> None:
    """What it names is begun at once, as many as it may; its plans bring in what a step's tokens share."""
    trace = trace_of([[[0], [3]], [[1], [2]]] * 40)
    setting = msgspec.structs.replace(SETTING, num_frames=3)
    its = play(trace, setting, "server", "oracle")
    alone = play(trace, setting, "cost-aware", None)
    assert its.prefetches_used > 70  # of 160; only once its scores have come true are they believed
    assert its.stall_seconds < 0.5 * alone.stall_seconds
    auto = play(trace, setting, "server", "auto")
    assert auto.hits + auto.misses == 160


def test_late_arrivals_widen_the_horizon() -> None:
    """3 layers; by the formula it is 1: a layer's expert takes 1.75 s of a layer's 2."""
    trace = trace_of([[[step % 4], [(step + 1) % 4], [(step + 2) % 4]] for step in range(12)])
    slow = msgspec.structs.replace(SETTING, num_frames=3, speed=LinkSpeed(1000 / 1.75, 0, 1000))
    its = play(trace, slow, "cost-aware+prefetch", "oracle")
    # A step's first expert has 1 s, and is late, unless it is a resident. Eight are known to have been
    # when the eleventh step begins.
    assert its.prefetches_late == 10
    assert its.mean_horizon == pytest.approx((10 * 1 + 2 * 2) / 12)


def test_belady_takes_the_same_time_as_in_the_plain_replay() -> None:
    trace = trace_of([[[0], [3]], [[1], [3]], [[0], [2]], [[1], [3]]])
    setting = msgspec.structs.replace(SETTING, num_frames=3)
    its = belady(trace, setting)
    plain = replay_experts(trace, 3, Link(1000, 0, 2.0), "oracle")
    assert (its.hits, its.misses) == (plain.hits, plain.misses)
    assert its.seconds == pytest.approx(plain.step_seconds * 4)


def test_without_prefetching_time_is_that_of_the_plain_replay() -> None:
    trace = trace_of([[[0], [3]], [[1], [2]], [[0], [3]], [[2], [2]]] * 3)
    setting = msgspec.structs.replace(SETTING, num_frames=3, speed=LinkSpeed(1000, 0.25, 250))
    for policy in ("lru", "lfu", "cost-aware"):
        its = play(trace, setting, policy, None)
        plain = replay_experts(trace, 3, Link(1000, 0.25, 2.0), policy)
        assert (its.hits, its.misses) == (plain.hits, plain.misses)
        assert its.seconds == pytest.approx(plain.step_seconds * trace.num_steps)


def test_the_future_is_known_of_this_step_and_of_the_next_if_asked() -> None:
    this = Forecast(Foreseen(TWO_STEPS, knows_next_step=False), num_layers=2, calibration=None)
    both = Forecast(Foreseen(TWO_STEPS, knows_next_step=True), num_layers=2, calibration=None)
    for forecast, first_layer in ((this, []), (both, [1])):
        run, _ = new_run(TWO_STEPS, SETTING, "cost-aware+expect", forecast)
        run.step(0)
        assert np.flatnonzero(forecast.probabilities()[0]).tolist() == first_layer
        run.step(1)
        assert not forecast.probabilities().any()  # nothing comes after that


def test_who_knows_the_next_step_begins_before_it() -> None:
    """With nothing to compute before its router, a step's first layer is too early for all others."""
    setting = msgspec.structs.replace(SETTING, attention_ratio=0.0)
    this = play(TWO_STEPS, setting, "cost-aware+prefetch", "oracle")
    both = play(TWO_STEPS, setting, "cost-aware+prefetch", "oracle_next_step")
    assert (this.stall_seconds, both.stall_seconds) == (2.0, 1.0)


def test_errors_are_swaps_within_a_layer() -> None:
    random = np.random.default_rng(1)
    uses = random.random((50, 2, 8)) < 0.5
    named = with_errors(uses, 0.75)
    assert (named.sum(axis=2) == uses.sum(axis=2)).mean() > 0.9  # where there are others to name
    assert (named & uses).sum() / uses.sum() == pytest.approx(0.75, abs=0.05)
    assert (with_errors(np.ones((1, 1, 4), bool), 0.0) == 0).all()


def test_requests_are_forgotten_after_their_last_step() -> None:
    rows = [
        [Kind.FORWARD, 0, 0, 1, 0],
        [Kind.RELEASE, 4, 0, 0, 0],
        [Kind.FORWARD, 1, 1, 2, 0],
        [Kind.FORWARD, 2, 2, 3, 0],
        [Kind.RELEASE, 5, 0, 0, 0],
    ]
    assert released_after(trace_of([[[0], [3]]] * 3, rows)) == {0: [4], 2: [5]}


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["none.npz", "--policies", "lru,most-recent"])
    assert "most-recent" in capsys.readouterr().err


UNTRAINED = ("last_step", "previous_layer", "frequency", "expert_map", "pregate", "random")
STEPS = st.lists(
    st.lists(
        st.lists(st.integers(0, 3), min_size=2, max_size=2, unique=True), min_size=2, max_size=2
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(
    STEPS,
    st.integers(2, 8),
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from([*BOUNDS, *UNTRAINED]),
    st.booleans(),
    st.sampled_from([300, 1000, 4000]),
)
def test_whatever_is_predicted(
    steps: list[list[list[int]]],
    num_frames: int,
    policy: str,
    predictor: str,
    applies_late: bool,
    bandwidth: int,
) -> None:
    """Memory stays whole, every prefetch ends, and no expert is missed or moved twice over."""
    trace = trace_of(steps)
    setting = msgspec.structs.replace(
        SETTING,
        num_frames=num_frames,
        applies_late=applies_late,
        speed=LinkSpeed(bandwidth, 0.1, 400),
    )
    run = PrefetchReplay(trace, setting, POLICIES[policy].memory)
    if POLICIES[policy].expects:
        run.use(predictor, Made(trace), POLICIES[policy])
    for step in range(trace.num_steps):
        run.step(step)
        assert run.memory.violations() == []
    its = run.outcome(policy, predictor)
    assert its.hits + its.misses == uses_of(trace).sum()
    assert its.compute_seconds == pytest.approx(trace.num_steps * 4.0)
    ended = its.prefetches_used + its.prefetches_late + its.prefetches_wasted
    on_their_way = len(run.link.on_their_way())
    assert ended <= its.prefetches_begun
    assert its.prefetches_begun - ended - on_their_way <= num_frames  # there, and not used yet
    assert its.bytes_moved <= (its.misses + its.prefetches_begun) * 1000
    assert its.busy_seconds <= its.seconds + 1e-9
    assert not math.isnan(its.hit_ratio)


def test_plec_through_memory() -> None:
    """He's ExpertFlow, 3.4: {e12, e13, e14} and {e22, e23} with four frames, layer by layer."""
    link = SimulatedLink(LinkSpeed(1000, 0, 250), expert_bytes=1000)
    memory = MemoryManager(
        msgspec.structs.replace(GEOMETRY, num_frames=4),
        num_layers=2,
        num_experts=4,
        floor_frames=3,
        load_experts=link.load,
        policy=MemoryPolicy.COST_AWARE,
        background=link,
    )
    predicted = np.array([[0, 1, 1, 1], [0, 1, 1, 0]], np.float32)

    def look_ahead(layer: int, num_frames: int) -> int:
        memory.expect(layer, predicted)
        is_resident = memory.frame_table != ABSENT
        snapshot = PrefetchSnapshot(layer, predicted, is_resident, 2, 8, 0.05)
        return memory.prefetch(plan_frames(snapshot, num_frames).wanted)

    memory.begin_step()
    assert look_ahead(-1, num_frames=4) == 4
    link.compute(4.0)
    for _ in memory.waves(0, [1, 2, 3]):
        resident = (memory.frame_table != ABSENT).tolist()
        assert resident == [[False, True, True, True], [False, True, False, False]]
        assert look_ahead(0, num_frames=4 - 3) == 0  # e22 has the one frame that is left
    assert look_ahead(0, num_frames=4) == 1  # layer 1 of the paper is done: e23
    link.compute(1.0)
    for _ in memory.waves(1, [1, 2]):
        assert (memory.frame_table[1] != ABSENT).tolist() == [False, True, True, False]
    assert (memory.snapshot(0).expert_hits, link.stall_seconds) == (5, 0.0)


def test_figures_are_written_by_trace(tmp_path: Path) -> None:
    found = [play(TWO_STEPS, SETTING, "lru", None), play(TWO_STEPS, SETTING, "plec", "oracle")]
    save({"two steps": found}, {"commit": "abc"}, tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["run"] == {"commit": "abc"}
    lru, plec = written["traces"]["two steps"]
    assert (lru["policy"], lru["predictor"], lru["stall_ratio"]) == ("lru", None, 0.333333)
    assert (plec["policy"], plec["predictor"], plec["hit_ratio"]) == ("plec", "oracle", 1.0)
    assert stall_share(found[1], found) == 0.0
