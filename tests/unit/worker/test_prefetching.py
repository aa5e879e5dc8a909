"""What runs is told to the predictor, and what it asks for is begun: 2 layers of 4 experts, 8 frames."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from loopback import loopback

from sglmoe.config import PrefetchMode
from sglmoe.memory.arena import Geometry
from sglmoe.memory.experts import ABSENT, Load
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.prefetch import Arrival, Wanted
from sglmoe.memory.step_times import StepTimes
from sglmoe.prediction.advisor import Advisor
from sglmoe.prediction.predictor import LayerRouting, Scores, StepTokens
from sglmoe.prediction.trial import Trial, Verdict
from sglmoe.predictor.client import Said
from sglmoe.predictor.messages import Advice, LayerRouted, StepBegun, Wishes
from sglmoe.protocol import NewRequest
from sglmoe.worker.prefetching import REPORT_STEPS, Prefetching
from sglmoe.worker.request import WorkerRequest
from sglmoe.worker.routed import Routed
from sglmoe.worker.step_watch import StepCost, StepKind


class Expert3:
    """Is sure of expert 3, in both layers."""

    wants_gate_input = True
    wants_probabilities = True

    def __init__(self) -> None:
        self.tokens: list[StepTokens] = []
        self.routing: list[LayerRouting] = []
        self.forgotten: list[int] = []
        self._scores: Scores = np.zeros((2, 4), np.float32)
        self._scores[:, 3] = 1

    def begin_step(self, tokens: StepTokens) -> None:
        self.tokens.append(tokens)

    def observe(self, routing: LayerRouting) -> None:
        self.routing.append(routing)

    def scores(self) -> Scores:
        return self._scores

    def forget(self, owner: int) -> None:
        self.forgotten.append(owner)


class Background:
    """Loads that are there as soon as somebody asks."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, int]] = []
        self._ended: list[Arrival] = []

    def begin(self, load: Load) -> None:
        self.begun.append((load.layer, load.expert))
        self._ended.append(Arrival(load, True))

    def finished(self) -> list[Arrival]:
        ended, self._ended = self._ended, []
        return ended

    def promote(self, load: Load) -> None:
        self.cancel(load)

    def wait(self, load: Load) -> bool:
        return True

    def cancel(self, load: Load) -> None:
        self._ended = [its for its in self._ended if its.load != load]


class AlwaysOn(Trial):
    def __init__(self) -> None:
        super().__init__()
        self.is_on = True
        self.steps: list[tuple[int, float]] = []

    def step_done(self, num_rows: int, seconds: float) -> Verdict | None:
        self.steps.append((num_rows, seconds))
        return None


class Bench:
    def __init__(self, mode: PrefetchMode = PrefetchMode.ON):
        self.background = Background()
        geometry = Geometry(
            num_frames=8,
            frame_bytes=100,
            expert_bytes=90,
            page_bytes=50,
            page_tokens=4,
            pages_per_frame=2,
            page_rows=24,
        )
        self.memory = MemoryManager(
            geometry,
            num_layers=2,
            num_experts=4,
            floor_frames=1,
            load_experts=lambda loads: None,
            background=self.background,
        )
        self.predictor, self.bulk, self.trial = Expert3(), Expert3(), AlwaysOn()
        frame_table = np.full((2, 4), ABSENT, np.int32)
        advisor = Advisor({"three": self.predictor}, self.bulk, frame_table=frame_table)
        self.client, self.line = loopback(advisor, frame_table)
        times = StepTimes()
        times.note_loads(1, waited_seconds=0.002, link_seconds=0.002)
        times.note_decode(1, 0.002)
        self.prefetching = Prefetching(
            self.memory,
            self.client,
            mode=mode,
            times=times,
            first_load_seconds=0.001,
            trial=self.trial,
            embed=lambda token_ids: np.stack([token_ids, token_ids], axis=1),
        )

    def begin(self, *rids: str, tokens_each: int = 1) -> None:
        num_tokens = len(rids) * tokens_each
        self.memory.begin_step()
        self.prefetching.begin_step(
            rids,
            token_ids=np.arange(num_tokens),
            positions=np.arange(num_tokens),
            owners=np.repeat(np.arange(len(rids)), tokens_each),
        )

    def layer(self, layer: int, *experts: int) -> None:
        """As the model does it."""
        routed = Routed(layer, torch.tensor([experts]), torch.zeros(1, 4), torch.ones(1, 6))
        self.prefetching.routed(layer, routed)
        for _ in self.memory.waves(layer, experts):
            self.prefetching.look_ahead()
        self.prefetching.look_ahead()

    def step(self) -> None:
        self.begin("a")
        self.prefetching.look_ahead()
        self.layer(0, 3)
        self.layer(1, 3)

    def say(self, *, step: int, layer: int) -> None:
        """As if the predictor had just said so."""
        probabilities = np.zeros((2, 4), np.float32)
        probabilities[:, 3] = 1
        wanted = [Wanted(0, 3, 1.0), Wanted(1, 3, 1.0)]
        self.client.outlook()  # what it has said already
        self.line.say(Advice(step, layer, probabilities.tobytes(), wanted))

    def done(self, *, num_decoding: int = 1, seconds: float = 0.5) -> None:
        requests = [WorkerRequest(new_request(f"r{n}")) for n in range(num_decoding)]
        kind = StepKind(requests, 0 if num_decoding else 100)
        cost = StepCost(seconds=seconds, stall_seconds=0.0, misses=0)
        self.report = self.prefetching.step_done(kind, self.memory.snapshot(0), cost)


def new_request(rid: str) -> NewRequest:
    return NewRequest(
        rid=rid,
        prompt_ids=b"",
        output_ids=b"",
        sampling=b"",
        max_new_tokens=9,
        namespace="",
        logprobs=None,
        routed_experts_start=None,
        requires_reasoning=False,
    )


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    its = Bench(getattr(request, "param", PrefetchMode.ON))
    yield its
    its.prefetching.close()


def test_what_has_come_true_is_begun_ahead(bench: Bench) -> None:
    for _ in range(30):
        bench.step()
    bench.memory.clear()
    bench.background.begun.clear()
    before = bench.memory.snapshot(0).prefetches_used
    bench.begin("a")
    bench.prefetching.look_ahead()
    assert bench.background.begun == [(0, 3)]
    bench.layer(0, 3)
    assert bench.background.begun == [(0, 3), (1, 3)]
    bench.layer(1, 3)
    assert bench.memory.snapshot(0).prefetches_used == before + 2


def test_after_the_last_layer_the_next_step_is_begun(bench: Bench) -> None:
    for _ in range(30):
        bench.step()
    bench.begin("a")
    bench.layer(0, 3)
    bench.memory.clear()
    bench.background.begun.clear()
    before = bench.memory.snapshot(0).prefetches_used
    bench.layer(1, 0)
    assert bench.background.begun == [(0, 3)]
    bench.begin("a")
    bench.layer(0, 3)
    assert bench.memory.snapshot(0).prefetches_used == before + 1


def test_frames_are_told_of_the_layers_that_somebody_looks_at() -> None:
    bench = Bench(PrefetchMode.OBSERVE)
    bench.begin("a")
    bench.layer(0, 1, 3)
    told = []
    for layer in (0, 1):
        bench.client.wishes = Wishes(layers_ahead=0)
        bench.layer(layer, 0)
        event = bench.line.told[-1]
        assert isinstance(event, LayerRouted)
        told.append((np.frombuffer(event.frames, np.int32).reshape(-1, 4) != ABSENT).tolist())
    assert told[0] == [[False, True, False, True]], "before its own are loaded"
    assert told[1] == [[True, True, False, True], [False] * 4], "all, for the next step"


def test_what_comes_late_is_begun_for_the_layers_ahead_alone(bench: Bench) -> None:
    bench.begin("a")
    bench.layer(0, 1)
    bench.say(step=1, layer=-1)
    bench.prefetching.look_ahead()
    assert bench.background.begun == [(1, 3)]
    bench.say(step=0, layer=0)
    bench.memory.clear()
    bench.prefetching.look_ahead()
    assert bench.background.begun == [(1, 3)], "another step's"


def test_what_was_said_after_the_last_layer_holds_when_the_next_step_begins(bench: Bench) -> None:
    bench.begin("a")
    bench.layer(0, 1)
    bench.layer(1, 1)
    bench.say(step=1, layer=1)
    bench.begin("a")
    assert bench.background.begun == [(0, 3)], "the link has work for one"
    bench.layer(0, 3)
    assert bench.memory.snapshot(0).prefetches_used == 1


@pytest.mark.parametrize("bench", [PrefetchMode.OBSERVE], indirect=True)
def test_observing_moves_nothing_and_keeps_score(bench: Bench) -> None:
    for _ in range(REPORT_STEPS):
        bench.step()
        bench.done()
    assert bench.background.begun == []
    assert bench.trial.steps == []
    assert (bench.report.mode, bench.report.is_on, bench.report.predictor) == (
        "observe",
        False,
        "three",
    )
    assert bench.report.recall > 0.8
    assert len(bench.report.recall_by_layer) == 2


def test_nothing_is_begun_while_a_trace_is_recorded(bench: Bench) -> None:
    for _ in range(30):
        bench.step()
    bench.memory.clear()
    bench.background.begun.clear()
    bench.prefetching.pause(True)
    bench.step()
    assert bench.background.begun == []
    bench.prefetching.pause(False)
    bench.memory.clear()
    bench.step()
    assert bench.background.begun != []


def test_a_trial_that_says_no_is_obeyed(bench: Bench) -> None:
    bench.trial.is_on = False
    for _ in range(30):
        bench.step()
    assert bench.background.begun == []


def test_predictors_rest_while_nothing_is_going_to_be_prefetched(bench: Bench) -> None:
    bench.step()
    told = len(bench.predictor.tokens), len(bench.predictor.routing)
    bench.trial.is_on = False
    bench.trial._hold_steps = 1000
    bench.step()
    assert (len(bench.predictor.tokens), len(bench.predictor.routing)) == told
    bench.trial._hold_steps = 1  # the next trial is near
    bench.step()
    assert len(bench.predictor.routing) == told[1] + 2


def test_advice_is_asked_for_where_it_is_taken(bench: Bench) -> None:
    told = []
    for is_on, is_paused in ((True, False), (False, False), (True, True)):
        bench.trial.is_on = is_on
        bench.prefetching.pause(is_paused)
        bench.begin("a")
        event = bench.line.told[-1]
        assert isinstance(event, StepBegun)
        told.append(event.wants_advice)
    assert told == [True, False, False]


def test_only_decode_steps_are_tried(bench: Bench) -> None:
    bench.step()
    bench.done(num_decoding=3, seconds=0.25)
    bench.done(num_decoding=0)
    assert bench.trial.steps == [(3, 0.25)]


def test_a_step_begins_with_what_became_of_the_prefetches_of_the_last(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[StepBegun] = []

    def tell(said: Said) -> None:
        assert isinstance(said.its, StepBegun)
        told.append(said.its)

    monkeypatch.setattr(bench.client, "tell", tell)
    bench.begin("a")
    bench.memory.prefetch([Wanted(0, 1, 1.0), Wanted(1, 2, 1.0)])
    bench.memory.clear()  # both are given up
    bench.done()
    bench.begin("a")
    bench.done()
    bench.begin("a")
    assert [(its.late, its.unused) for its in told] == [(0, 0), (0, 2), (0, 0)]


def test_requests_have_numbers_and_steps_their_tokens(bench: Bench) -> None:
    bench.begin("a", "b", tokens_each=2)
    bench.prefetching.forget("a")
    bench.begin("c", "b")
    first, second = bench.predictor.tokens
    assert first.owners.tolist() == [0, 0, 1, 1]
    assert first.token_ids.tolist() == [0, 1, 2, 3]
    assert second.owners.tolist() == [0, 1], "the number of one that has ended is free"
    bench.begin("c", "b")
    assert bench.predictor.forgotten == [0], "once"


def test_the_predictor_gets_what_it_wants_of_a_layer(bench: Bench) -> None:
    bench.begin("a")
    bench.layer(0, 1)
    [routing] = bench.predictor.routing
    assert routing.expert_ids.tolist() == [[1]]
    assert routing.probabilities.tolist() == [[0.25] * 4]
    assert routing.gate_input is not None
    assert routing.gate_input.tolist() == [[1.0] * 6]


def test_what_it_does_not_want_is_not_copied(bench: Bench) -> None:
    bench.predictor.wants_probabilities = bench.predictor.wants_gate_input = False
    bench.begin("a")
    bench.prefetching.look_ahead()  # that is how it is known
    bench.layer(0, 1)
    [routing] = bench.predictor.routing
    assert routing.probabilities.shape == (0, 4)
    assert routing.gate_input is None


def test_embeddings_are_looked_up_for_those_who_want_them(bench: Bench) -> None:
    def sent() -> bytes:
        its = bench.line.told[-1]
        assert isinstance(its, StepBegun)
        return its.embeddings

    bench.begin("a", "b")
    assert np.frombuffer(sent(), np.float32).tolist() == [0, 0, 1, 1]
    bench.prefetching.look_ahead()
    bench.client.wishes = Wishes()  # as if somebody had asked
    bench.begin("a", tokens_each=1000)
    assert sent() == b"", "a long prompt's would be hundreds of megabytes"
    bench.prefetching.look_ahead()
    bench.begin("a")
    assert sent() == b"", "nobody has asked for any"


def test_a_predictor_that_dies_while_it_rests_is_noticed(bench: Bench) -> None:
    bench.trial.is_on = False
    bench.trial._hold_steps = 1000
    bench.line.end = "dead"
    for _ in range(REPORT_STEPS):
        bench.begin("a")
        bench.done()
    assert bench.report.failed


def test_of_a_long_prompt_it_gets_the_choices_alone(bench: Bench) -> None:
    bench.begin("a", tokens_each=1000)
    bench.layer(0, 1)
    [routing] = bench.bulk.routing
    assert routing.expert_ids.tolist() == [[1]]
    assert routing.probabilities.shape == (0, 4)
    assert routing.gate_input is None


def test_what_was_saved_is_what_loads_would_have_taken(bench: Bench) -> None:
    for _ in range(REPORT_STEPS - 1):
        bench.step()
        bench.done()
    bench.memory.clear()
    bench.step()
    used = bench.memory.snapshot(0).prefetches_used
    assert used > 1
    bench.done()
    assert bench.report.saved_seconds == pytest.approx(used * 0.002)
