"""Steps that run without the host, as the host sees them: it lends frames, and learns afterwards who came and went.

2 layers of 4 experts, 8 frames of 100 bytes. Every byte of expert e of layer l is 10 * l + e + 1; a layer's output for a row is
what it reads of each of the row's two experts. Kernels are their references.
"""

import itertools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lent_steps import lent
from prefetched_memory import Memory

from sglmoe.kernels import reference
from sglmoe.kernels.dispatch import Dispatched
from sglmoe.kernels.residency import PageIns
from sglmoe.memory.experts import Load
from sglmoe.memory.host_tier import HostTier
from sglmoe.memory.promotion import Promotion
from sglmoe.worker import step_messages
from sglmoe.worker.captured_steps import MAX_BEHIND, CapturedSteps, captured_steps
from sglmoe.worker.routed import Routed
from sglmoe.worker.step_messages import Letters
from sglmoe.worker.step_state import Sizes, StepState

FRAME_BYTES, TOP_K, MAX_ROWS = 100, 2, 3


class Kernels:
    commit = staticmethod(reference.commit)

    def __init__(self, blocks: torch.Tensor):
        self._blocks = blocks
        self.frames = torch.zeros((8, FRAME_BYTES), dtype=torch.uint8)
        self.paged_in: list[int] = []  # what each expert is full of

    def page_in(self, page_ins: PageIns) -> None:
        its = {"sources": page_ins.sources, "frames": page_ins.frames, "count": page_ins.count}
        self.paged_in += self._blocks[page_ins.sources[: int(page_ins.count)], 0].tolist()
        reference.page_in(self._blocks, self.frames.view(-1), frame_bytes=FRAME_BYTES, **its)

    def dispatch(self, routing: Routed, **its: Any) -> Dispatched:
        return reference.dispatch(routing.ids, routing.layer, block_tokens=2, **its)

    def forward(
        self, routing: Routed, weights: torch.Tensor, dispatched: Dispatched, *, config: Any
    ) -> torch.Tensor:
        """What the GEMM reads: a block's frame, and nothing where it has none."""
        frames = dispatched.frames.repeat_interleave(2)
        read = self.frames[frames, 0].float().masked_fill(frames < 0, 0)
        outputs = torch.full((routing.ids.numel() + 1,), torch.nan)
        outputs[dispatched.pairs.long()] = read
        return outputs[:-1].view(routing.ids.shape)


class Bench:
    def __init__(self, *, is_filled: bool = True, prefetches: bool = False):
        self.memory = Memory()
        self.tier = HostTier(np.zeros((8, 90), np.uint8), num_layers=2, num_experts=4)
        if is_filled:
            self.fill_host_memory()
        self.marks = itertools.count()
        self.letters = Letters(2, 4, "cpu", mark=lambda: next(self.marks)) if prefetches else None
        self.told: list[Any] = []  # the observer: of a layer and its ids
        self.uses: list[Any] = []  # the counter
        self.num_ahead = 1
        self.look: Callable[[], object] = int
        observer = SimpleNamespace(
            num_ahead=1,
            routed=lambda layer, its: self.told.append((layer, its.ids.tolist())),
            look_ahead=lambda: self.look(),
        )
        counter = SimpleNamespace(note_all=lambda is_used: self.uses.append(is_used.astype(int)))
        self.experts: Any = SimpleNamespace(observer=observer, counters=[counter], captured=None)
        self.kernels = Kernels(torch.from_numpy(self.tier.blocks))
        self.steps = CapturedSteps(
            self.kernels,
            Sizes(2, 4, TOP_K, MAX_ROWS),
            experts=self.experts,
            memory=self.memory,
            tier=self.tier,
            letters=self.letters,
            device="cpu",
        )

    def fill_host_memory(self) -> None:
        for layer in range(2):
            for expert in range(4):
                block = self.tier.begin(Promotion(layer, expert))
                assert block is not None
                self.tier.blocks[block] = 10 * layer + expert + 1
                self.tier.finish(block, 90)

    def compute(self, layer: int, *rows: list[int]) -> list[list[float]]:
        """As the graph does."""
        ids = torch.tensor(rows, dtype=torch.int32)
        nothing = torch.zeros((len(rows), 4))
        routing = Routed(layer, ids, nothing, nothing)
        output: list[list[float]] = self.steps.compute(routing, nothing, config=None).tolist()
        return output

    def step(
        self, first: list[list[int]], second: list[list[int]], *, num_rows: int
    ) -> list[list[list[float]]]:
        self.memory.begin_step()
        with lent(self.steps, num_rows) as is_lent:
            assert is_lent
            outputs = [self.compute(layer, *rows) for layer, rows in enumerate((first, second))]
            self.steps.queued()
            self.steps.watch()
        assert self.memory.violations() == []
        return outputs


def test_layers_read_the_experts_that_they_are_routed_to() -> None:
    bench = Bench()
    assert bench.step([[0, 1], [1, 2]], [[3, 0], [3, 0]], num_rows=2) == [
        [[1, 2], [2, 3]],
        [[14, 11], [14, 11]],
    ]
    assert bench.memory.residents() == ["0.0", "0.1", "0.2", "1.0", "1.3"]
    assert bench.kernels.paged_in == [1, 2, 3, 11, 14]
    assert bench.step([[3, 1]], [[3, 1]], num_rows=1) == [[[4, 2]], [[14, 12]]]
    assert bench.kernels.paged_in[5:] == [4, 12]  # the others are there
    snapshot = bench.memory.snapshot(0)
    assert (snapshot.expert_hits, snapshot.expert_misses) == (2, 7)


def test_rows_that_pad_a_step_bring_nobody_in_and_get_zeros() -> None:
    bench = Bench()
    (first, second) = bench.step([[2, 1], [0, 3], [9, 9]], [[3, 2], [0, 1], [9, 9]], num_rows=1)
    assert first == [[3, 2], [0, 0], [0, 0]]
    assert second == [[14, 13], [0, 0], [0, 0]]
    assert bench.memory.residents() == ["0.1", "0.2", "1.2", "1.3"]
    assert {layer: ids.tolist() for layer, ids in bench.steps.routing().items()} == {
        0: [[2, 1]],
        1: [[3, 2]],
    }


def test_counters_of_uses_are_told_of_each_step() -> None:
    bench = Bench()
    bench.step([[0, 1], [1, 2]], [[3, 0], [3, 0]], num_rows=2)
    bench.step([[0, 1], [1, 2]], [[3, 0], [3, 1]], num_rows=1)
    assert [its.tolist() for its in bench.uses] == [
        [[1, 1, 1, 0], [1, 0, 0, 1]],
        [[1, 1, 0, 0], [1, 0, 0, 1]],
    ]


def test_nothing_is_lent_before_host_memory_holds_all_experts_nor_for_more_rows_than_captured() -> (
    None
):
    bench = Bench(is_filled=False)
    with lent(bench.steps, 1) as is_lent:
        assert not is_lent
    bench.fill_host_memory()
    for num_rows, may_run in ((1, True), (MAX_ROWS, True), (MAX_ROWS + 1, False)):
        with lent(bench.steps, num_rows) as is_lent:
            assert is_lent == may_run
        assert bench.memory.violations() == []


def test_for_as_many_rows_as_experts_may_have_too_few_frames_nothing_is_lent() -> None:
    """Two rows may need all four experts of each layer, and a request has three of the eight frames."""
    bench = Bench()
    bench.memory.admit("r", bytes(4 * 24), "")
    assert bench.memory.extend("r", 24)
    for num_rows, may_run in ((1, True), (2, False)):
        with lent(bench.steps, num_rows) as is_lent:
            assert is_lent == may_run


def test_whoever_is_worth_least_gives_way_on_the_device() -> None:
    """Three frames for each layer, in which 0 was used every other time, 1 every time, 2 never since."""
    bench = Bench()
    bench.memory.admit("r", bytes(4 * 16), "")
    assert bench.memory.extend("r", 16)
    bench.step([[2, 0]], [[2, 0]], num_rows=1)
    for _ in range(4):
        bench.step([[0, 1]], [[0, 1]], num_rows=1)
    bench.step([[1, 3]], [[1, 3]], num_rows=1)
    assert bench.memory.residents() == ["0.0", "0.1", "0.3", "1.0", "1.1", "1.3"]


def test_experts_that_found_no_frame_are_an_error_of_ours() -> None:
    state = StepState(Sizes(2, 4, TOP_K, MAX_ROWS), "cpu")
    sets, table = Memory().lend(1), np.zeros((2, 4), np.int32)
    assert sets is not None
    state.upload(1, sets, table, 1)
    state.residency.shortfall.add_(2)
    state.queue_back(1)
    with pytest.raises(AssertionError, match="2 experts found no frame"):
        state.read_back(1)
    state.upload(2, sets, table, 1)  # and of the next step it says nothing
    state.queue_back(2)
    assert state.read_back(2).sizes.tolist() == sets.sizes.tolist()


@pytest.mark.parametrize(
    ("tier", "words"),
    [
        ({"num_blocks": 7}, "raise --host-memory from 112 B to 128 B, or use breakable"),
        (
            {"num_blocks": 7, "expert_bytes": 32, "as_stored": True},
            "raise --host-memory from 112 B to 128 B, or use breakable",
        ),
        (
            {"block_bytes": 24, "expert_bytes": 24},
            "move whole 16 B, and an expert of this model has 24 B",
        ),
        (
            {"expert_bytes": 24, "as_stored": True},
            "move whole 16 B, and an expert of this model has 24 B",
        ),
    ],
)
def test_steps_that_could_never_run_are_refused_at_once(tier: dict[str, int], words: str) -> None:
    its = {"num_blocks": 8, "block_bytes": 16, "expert_bytes": 16, "as_stored": False} | tier
    blocks = np.zeros((its["num_blocks"], its["block_bytes"]), np.uint8)
    experts: Any = SimpleNamespace(store=SimpleNamespace(expert_bytes=lambda: its["expert_bytes"]))
    with pytest.raises(ValueError, match=re.escape(words)):
        captured_steps(
            Sizes(2, 4, TOP_K, MAX_ROWS),
            experts,
            torch.zeros(8 * FRAME_BYTES, dtype=torch.uint8),
            FRAME_BYTES,
            memory=Memory(),
            tier=HostTier(blocks, num_layers=2, num_experts=4, as_stored=bool(its["as_stored"])),
            letters=None,
        )


# ------------------------------------------------------------------------------------ prefetches


@pytest.fixture
def prefetching(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(step_messages, "post", reference.post)
    return Bench(prefetches=True)


def begin_prefetch(bench: Bench, key: str) -> Load:
    assert bench.memory.want(key) == 1
    return bench.memory.background_loads.under_way[-1]


def bring(bench: Bench, load: Load) -> None:
    """As the thread does that prefetches: bytes, letter, and then it is told as finished."""
    assert bench.letters is not None
    bench.kernels.frames[load.frame] = 10 * load.layer + load.expert + 1
    bench.letters.came(load)
    bench.memory.background_loads.arrive()


def test_a_prefetch_that_comes_in_time_joins_its_layer(prefetching: Bench) -> None:
    bench = prefetching
    bench.memory.begin_step()
    with lent(bench.steps, 1):
        bench.compute(0, [0, 1])
        bring(bench, begin_prefetch(bench, "1.3"))
        assert bench.compute(1, [3, 0]) == [[14, 11]]
        bench.steps.queued()
    assert bench.memory.violations() == []
    assert bench.kernels.paged_in == [1, 2, 11]  # not 14
    snapshot = bench.memory.snapshot(0)
    assert (snapshot.prefetches_begun, snapshot.prefetches_used) == (1, 1)


def test_one_that_comes_too_late_is_a_resident_afterwards(prefetching: Bench) -> None:
    bench = prefetching
    bench.memory.begin_step()
    with lent(bench.steps, 1):
        load = begin_prefetch(bench, "1.3")
        bench.compute(0, [0, 1])
        bench.compute(1, [1, 0])
        bring(bench, load)
        bench.steps.queued()
    bench.step([[0, 1]], [[3, 0]], num_rows=1)
    assert bench.kernels.paged_in == [1, 2, 11, 12]


def test_a_letter_that_is_late_for_its_step_is_not_read_in_the_next(prefetching: Bench) -> None:
    """Else the frame would be in the set twice."""
    bench = prefetching
    bench.memory.begin_step()
    with lent(bench.steps, 1):
        load = begin_prefetch(bench, "1.3")
        bench.compute(0, [0, 1])
        bench.compute(1, [1, 0])
        bring(bench, load)
        bench.steps.queued()
    for _ in range(2):
        bench.step([[0, 1]], [[2, 3]], num_rows=1)
        frames = bench.memory.frame_table[1]
        assert len(set(frames[frames >= 0])) == (frames >= 0).sum()


def test_what_comes_between_two_steps_needs_no_letter(prefetching: Bench) -> None:
    bench = prefetching
    assert bench.letters is not None
    before = bench.letters.mailbox.posted.tolist()
    bring(bench, begin_prefetch(bench, "1.3"))
    assert bench.letters.mailbox.posted.tolist() == before


def test_a_prefetch_waits_for_what_was_queued_before_the_step_and_not_for_it(
    prefetching: Bench,
) -> None:
    bench = prefetching
    assert bench.letters is not None
    assert bench.letters.mark() == 0
    with lent(bench.steps, 1):
        assert bench.letters.mark() == bench.letters.mark() == 1
        bench.steps.queued()
    assert bench.letters.mark() == 2


def test_the_observer_is_told_of_real_rows_layer_by_layer(prefetching: Bench) -> None:
    bench = prefetching
    seen: list[int] = []
    bench.look = lambda: seen.append(len(bench.told))
    bench.step([[0, 1], [9, 9]], [[3, 0], [9, 9]], num_rows=1)
    assert bench.told == [(0, [[0, 1]]), (1, [[3, 0]])]
    assert seen[0] == 1
    assert seen[-1] == 2


# ------------------------------------------------------------------------------------ steps behind each other


def queue(bench: Bench, *experts: list[int]) -> list[list[list[float]]]:
    """A step of one row, in which each layer is routed to these."""
    outputs = [bench.compute(layer, its) for layer, its in enumerate(experts)]
    bench.steps.queued()
    return outputs


def test_a_step_goes_on_where_the_one_before_it_has_not_been_read_back() -> None:
    bench = Bench()
    bench.memory.begin_step()
    assert bench.steps.lend(1)
    assert queue(bench, [0, 1], [2, 3]) == [[[1, 2]], [[13, 14]]]
    assert bench.steps.may_go_on
    bench.steps.go_on(1)
    assert queue(bench, [1, 2], [3, 2]) == [[[2, 3]], [[14, 13]]]
    assert bench.memory.residents() == []  # as far as it has heard

    bench.steps.take_back(goes_on=True)
    assert bench.memory.residents() == ["0.0", "0.1", "1.2", "1.3"]
    assert bench.memory.violations() == []
    bench.memory.begin_step()
    bench.steps.go_on(1)
    assert queue(bench, [0, 3], [2, 1]) == [[[1, 4]], [[13, 12]]]
    for goes_on in (True, False):
        bench.steps.take_back(goes_on=goes_on)
        assert bench.memory.violations() == []
    assert bench.memory.residents() == ["0.0", "0.1", "0.2", "0.3", "1.1", "1.2", "1.3"]
    assert bench.kernels.paged_in == [1, 2, 13, 14, 3, 4, 12]
    assert [its.tolist() for its in bench.uses] == [
        [[1, 1, 0, 0], [0, 0, 1, 1]],
        [[0, 1, 1, 0], [0, 0, 1, 1]],
        [[1, 0, 0, 1], [0, 1, 1, 0]],
    ]


def test_who_gives_way_behind_another_step_is_by_worth_and_not_by_that_step() -> None:
    """Three frames a layer: 0 and 1 are used all the time, then 2 once and not 0; and it is 2 that goes for 3."""
    bench = Bench()
    bench.memory.admit("r", bytes(4 * 16), "")
    assert bench.memory.extend("r", 16)
    for _ in range(6):
        bench.step([[0, 1]], [[0, 1]], num_rows=1)
    bench.memory.begin_step()
    assert bench.steps.lend(1)
    queue(bench, [1, 2], [1, 2])
    for experts in ([1, 3], [0, 1]):
        bench.steps.go_on(1)
        queue(bench, experts, experts)
        bench.steps.take_back(goes_on=True)
    bench.steps.take_back()
    assert bench.memory.residents() == ["0.0", "0.1", "0.3", "1.0", "1.1", "1.3"]
    assert bench.kernels.paged_in[4:] == [3, 13, 4, 14]  # and 0 not again


def test_what_goes_on_is_laid_out_anew_now_and_then_but_where_all_experts_are_there() -> None:
    bench = Bench()
    bench.memory.admit("r", bytes(4 * 16), "")
    assert bench.memory.extend("r", 16)
    for _ in range(2):
        assert go_on_as_long_as_may_be(bench) == MAX_BEHIND
    bench.memory.release("r", b"", 0)
    bench.step([[0, 1], [2, 3]], [[0, 1], [2, 3]], num_rows=2)
    assert go_on_as_long_as_may_be(bench) > 2 * MAX_BEHIND


def go_on_as_long_as_may_be(bench: Bench) -> int:
    """How many steps behind a first one, but no more than thrice what is usual."""
    bench.memory.begin_step()
    assert bench.steps.lend(1)
    queue(bench, [0, 1], [0, 1])
    num_behind = 0
    while bench.steps.may_go_on and num_behind < 3 * MAX_BEHIND:
        bench.steps.go_on(1)
        queue(bench, [0, 1], [0, 1])
        bench.steps.take_back(goes_on=True)
        num_behind += 1
    bench.steps.take_back()
    return num_behind


def test_with_letters_a_step_is_read_back_before_the_next(prefetching: Bench) -> None:
    """Each is for one step."""
    with lent(prefetching.steps, 1):
        assert not prefetching.steps.may_go_on
        prefetching.steps.queued()
