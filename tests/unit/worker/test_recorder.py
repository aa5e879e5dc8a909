"""A recorded run, replayed, gives the counters of the run: whatever happened in it.

The arena has 8 frames of one expert or two pages of 4 tokens; the model 2 layers of 4 experts, of
which each token takes 2.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from eval.replay import replay_whole
from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Geometry, plan_geometry
from sglmoe.memory.manager import MemoryManager
from sglmoe.prediction.trace import Kind, Trace, load_trace
from sglmoe.protocol import NewRequest, RecordRouting, Row, StepPlan
from sglmoe.worker.recorder import Recorder, Recording
from sglmoe.worker.request import BatchRow
from sglmoe.worker.seams import Done, Pass, RowOutput
from sglmoe.worker.worker import Worker

GEOMETRY: Geometry = plan_geometry(
    arena_bytes=8 * 1024, expert_bytes=1024, token_bytes=128, token_rows=4, page_tokens=4
)
NUM_LAYERS, NUM_EXPERTS = 2, 4


class RoutingModel:
    """Routes a token with id t to experts t and t + 1, in the second layer one further."""

    num_behind = 0

    def __init__(self, memory: MemoryManager) -> None:
        self.recorder: Recorder | None = None
        self._memory = memory

    def write_token_ids(self, table_row: int, start: int, token_ids: np.ndarray) -> None: ...

    def write_decode_ids(
        self, table_rows: Sequence[int], positions: Sequence[int], token_ids: Sequence[int]
    ) -> None: ...

    def forget(self, rid: str) -> None: ...

    def begin(self, rows: Sequence[BatchRow]) -> Pass:
        ids = np.concatenate([row.request.tokens[row.start : row.stop] for row in rows])
        layers = np.arange(NUM_LAYERS)[None, :, None]
        experts = (ids[:, None, None] + layers + np.arange(2)) % NUM_EXPERTS
        for layer in range(NUM_LAYERS):
            for _ in self._memory.waves(layer, np.unique(experts[:, layer]).tolist()):
                assert self._memory.violations() == []
        if self.recorder is not None:
            self._record(self.recorder, rows, ids, experts)
        return Done([RowOutput(token_id=row.stop % 7 if row.samples else None) for row in rows])

    def _record(
        self,
        recorder: Recorder,
        rows: Sequence[BatchRow],
        ids: np.ndarray,
        experts: np.ndarray,
    ) -> None:
        recorder.forward(
            [row.request.rid for row in rows],
            token_ids=ids,
            positions=np.concatenate([np.arange(row.start, row.stop) for row in rows]),
            owners=np.repeat(np.arange(len(rows)), [row.stop - row.start for row in rows]),
            expert_ids=experts.astype(np.int32),
            probabilities=np.zeros((len(ids), NUM_LAYERS, NUM_EXPERTS), np.float16),
            seconds=0.5,
        )


class Bench:
    """A worker that can be recorded."""

    def __init__(self, policy: MemoryPolicy = MemoryPolicy.COST_AWARE) -> None:
        self.memory = MemoryManager(
            GEOMETRY,
            num_layers=NUM_LAYERS,
            num_experts=NUM_EXPERTS,
            floor_frames=2,
            load_experts=lambda loads: None,
            policy=policy,
            expert_ratio=0.5,
        )
        self.model = RoutingModel(self.memory)
        self.worker = Worker(memory=self.memory, model=self.model, max_running=4)
        self.pauses: list[bool] = []
        self.recording = Recording(
            self.worker,
            self.model,
            self.new_recorder,
            self.memory,
            pause=[self.pauses.append],
        )
        self.num_steps = 0

    def new_recorder(self) -> Recorder:
        return Recorder(self.memory, model="tiny", geometry=GEOMETRY, floor_frames=2)

    def ask(self, action: str, directory: Path = Path()) -> tuple[bool, str]:
        return self.recording.handle(RecordRouting(0, action, str(directory)))  # type: ignore[arg-type]

    def add(self, rid: str, prompt: Sequence[int], namespace: str = "") -> None:
        self.worker.add(
            NewRequest(
                rid=rid,
                prompt_ids=np.array(prompt, np.int32).tobytes(),
                output_ids=b"",
                sampling=b"",
                max_new_tokens=9,
                namespace=namespace,
                logprobs=None,
                routed_experts_start=None,
                requires_reasoning=False,
            )
        )

    def step(self, *rids: str, num_tokens: int = 16, **fields: tuple[str, ...]) -> list[str]:
        """The rids that found no memory."""
        self.num_steps += 1
        rows = tuple(Row(rid, num_tokens) for rid in rids)
        return list(self.worker.step(StepPlan(self.num_steps, rows, **fields)).rejected)

    def record(self, folder: Path) -> Trace:
        success, text = self.ask("dump", folder)
        assert success, text
        return load_trace(Path(text.partition(": ")[2]))


def test_a_run_and_its_trace(tmp_path: Path) -> None:
    bench = Bench()
    bench.add("warm", range(8))
    bench.step("warm")  # before the recording: forgotten by it
    bench.step(drop=("warm",))
    assert bench.ask("start") == (True, "recording")
    assert bench.memory.snapshot(0).free_frames == 8
    bench.add("a", [0, 0, 0, 0, 2])
    bench.step("a")
    bench.step("a", drop=())
    bench.step(drop=("a",))
    trace = bench.record(tmp_path)
    assert trace.num_steps == 2
    assert trace.step_bounds.tolist() == [0, 5, 6]
    assert trace.token_ids.tolist() == [0, 0, 0, 0, 2, 5]
    assert trace.tokens_of(0).tolist() == [0, 0, 0, 0, 2, 5]
    # Tokens 0 and 2 take 0 1 2 3 in both layers; then 5 takes 1 2, and 2 3.
    assert trace.experts_by_layer() == [[[0, 1, 2, 3]] * 2, [[1, 2], [2, 3]]]
    kinds = [Kind(kind) for kind in trace.operations[:, 0]]
    assert kinds[:5] == [Kind.PRICES, Kind.ADMIT, Kind.EXTEND, Kind.FORWARD, Kind.COMMIT]
    assert kinds[-1] is Kind.RELEASE
    assert replay_whole(trace) == trace.info.totals
    assert trace.info.totals.expert_misses >= 8


@pytest.mark.parametrize("seed", range(20))
def test_replay_gives_the_counters_of_any_run(seed: int, tmp_path: Path) -> None:
    """Requests that share prefixes, are dropped, preempted and rejected, under constant pressure."""
    rng = random.Random(seed)
    bench = Bench(rng.choice(list(MemoryPolicy)))
    bench.ask("start")
    alive: list[str] = []
    for number in range(40):
        if len(alive) < 3:
            rid = str(number)
            prefix = rng.choice([[1] * 8, [2] * 12, []])
            tail = [rng.randrange(7) for _ in range(rng.randint(1, 9))]
            bench.add(rid, prefix + tail, namespace=rng.choice(["", "mine"]))
            alive.append(rid)
        rng.shuffle(alive)
        drop = tuple(alive[:1]) if rng.random() < 0.3 else ()
        alive = [rid for rid in alive if rid not in drop]
        preempt = tuple(alive[:1]) if rng.random() < 0.1 else ()
        running = [rid for rid in alive if rid not in preempt]
        bench.step(*running, num_tokens=rng.randint(1, 12), drop=drop, preempt=preempt)
        if rng.random() < 0.05:
            bench.worker.flush_cache()
        if rng.random() < 0.05:
            bench.worker.memory.set_prices(
                expert_nanoseconds=rng.randrange(1, 10**6), token_nanoseconds=rng.randrange(10**6)
            )
    trace = bench.record(tmp_path)
    assert replay_whole(trace) == trace.info.totals
    assert trace.info.totals.experts_evicted > 0
    assert trace.info.totals.pages_evicted > 0


def test_recording_needs_an_idle_worker_and_dumping_a_recording(tmp_path: Path) -> None:
    bench = Bench()
    success, text = bench.ask("dump", tmp_path)
    assert not success
    assert text.startswith("no recording was started")
    bench.add("a", range(4))
    bench.step("a")
    success, text = bench.ask("start")
    assert not success
    assert "requests are running" in text
    bench.step(drop=("a",))
    assert bench.ask("start")[0]
    success, text = bench.ask("dump", tmp_path)
    assert not success
    assert text.startswith("nothing was recorded: no request ran")


def test_what_is_not_recorded_pauses_meanwhile(tmp_path: Path) -> None:
    bench = Bench()
    bench.ask("start")
    assert bench.pauses[-1]
    bench.ask("stop")
    assert not bench.pauses[-1]
    bench.ask("start")
    bench.ask("dump", tmp_path)
    assert not bench.pauses[-1]


def test_nothing_is_recorded_after_stop(tmp_path: Path) -> None:
    bench = Bench()
    bench.ask("start")
    bench.add("a", range(4))
    bench.step("a")
    bench.ask("stop")
    assert bench.worker.memory is bench.memory
    assert bench.model.recorder is None
    before = bench.memory.snapshot(0).expert_hits
    bench.step("a")
    trace = bench.record(tmp_path)
    assert trace.num_steps == 1
    assert bench.memory.snapshot(0).expert_hits > before
    assert replay_whole(trace) == trace.info.totals


def test_a_replay_that_goes_otherwise_says_so(tmp_path: Path) -> None:
    bench = Bench()
    bench.ask("start")
    bench.add("a", range(20))
    bench.step("a", num_tokens=20)
    trace = bench.record(tmp_path)
    trace.operations[trace.operations[:, 0] == Kind.ADMIT, 4] += 1
    with pytest.raises(ValueError, match="ADMIT of request 0, gave 0 where the server had 1"):
        replay_whole(trace)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros(3))
    with pytest.raises(ValueError, match="not a routing trace"):
        load_trace(path)
    np.savez(path, info=np.frombuffer(msgspec.json.encode({"version": 99}), np.uint8))
    with pytest.raises(ValueError, match="version 99"):
        load_trace(path)
