"""No race in steps that run without the host, beside threads that prefetch: as `test_device_protocol`, with frames lent.

All experts are in host memory, as they are or packed. The device decides when it does so what it reads and writes: letters
that have been posted, the blocks that it pages in, the frames that it replaces. Half of the steps go through the host as ever.
"""

from collections import Counter
from random import Random
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import Stream, bytes_of
from step_without_host import Step
from taken_turns import Times, join
from test_device_protocol import (
    EXPERTS,
    GEOMETRY,
    NUM_EXPERTS,
    NUM_LAYERS,
    Server,
    expert_number,
    run,
)
from test_packed_protocol import OnAnotherStream, PackedServer

from sglmoe.memory.device_transfer import StreamCopier
from sglmoe.memory.experts import Load
from sglmoe.memory.packed_order import NO_PACKING
from sglmoe.memory.promotion import Promotion, TierSnapshot
from sglmoe.worker import step_messages
from sglmoe.worker.step_messages import Letters


class Letter(NamedTuple):
    load: Load
    step: int
    times: Times


class LentServer(Server):
    """`acquires`: whether the device sees, with a letter, what was written before it."""

    acquires = True

    def __init__(self, random: Random, **faults: type):
        super().__init__(random, **faults)
        self.num_blocks = NUM_LAYERS * NUM_EXPERTS
        self.number = 0  # of the step
        self.posted: list[Letter] = []  # and not read
        self.begun_before: set[Load] = set()  # prefetches, the step

    def background_options(self, copier: StreamCopier) -> dict[str, Any]:
        self.letters = Letters(
            NUM_LAYERS,
            NUM_EXPERTS,
            "cpu",
            copier.mark,
            stream=self.device.Stream("letters"),
            on_stream=self.device.on_stream,
        )
        return {"mark": self.letters.mark, "came": self.letters.came}

    def more_stand_ins(self) -> list[tuple[Any, str, Any]]:
        return [(step_messages, "post", self.post)]

    def post(self, mailbox: Any, *, layer: int, expert: int, frame: int, step: int) -> None:
        """The kernel."""
        load = Load(frame, layer, expert)
        stream = self.device.current_stream()
        stream.queue_deciding(lambda times: self.posted.append(Letter(load, step, times)))

    def before_promoting(self) -> None:
        for layer, expert in EXPERTS:
            block = self.tier.begin(Promotion(layer, expert))
            assert block is not None
            self.tier.blocks[block] = expert_number(layer, expert)
            self.tier.finish(block, GEOMETRY.expert_bytes)

    def plan(self, snapshot: TierSnapshot, limit: int) -> list[Promotion]:
        return []  # none is absent, and so it stays

    def run_layers(self) -> None:
        if self.random.random() < 0.5:
            super().run_layers()
            return
        self.look_ahead(0)
        assert self.tier.holds_all
        sets = self.memory.lend(2, 2)
        if sets is None:
            self.seen["not lent"] += 1
            super().run_layers()
            return
        self.number += 1
        self.begun_before = set(self.memory._table.loading.values())
        self.letters.open(self.number)
        step = Step(sets)
        for layer in range(NUM_LAYERS):
            wanted = set(self.random.sample(range(NUM_EXPERTS), self.random.randint(1, 2)))
            self.launch_layer(step, layer, wanted)
        self.wait_for_the_step()
        self.letters.close()
        self.memory.take_back(step.sets)
        self.seen["lent"] += 1

    def wait_for_the_step(self) -> None:
        """The host works meanwhile."""
        done = self.device.Event()
        done.record(self.device.default)
        while not done.query():
            self.look_ahead(1)
            self.turns.turn()
        done.synchronize()

    def launch_layer(self, step: Step, layer: int, wanted: set[int]) -> None:
        number = self.number

        def compute(times: Times) -> None:
            self.read_letters(step, layer, number, times)
            num_before = len(step.page_ins)
            step.compute(layer, wanted)
            for _, expert, frame in step.page_ins[num_before:]:
                self.page_in(layer, expert, frame, times)
            for expert in wanted:
                self.read(step, layer, expert, times)

        for _ in range(8):  # attention and the like, which take their time
            self.device.default.queue_deciding(lambda times: None)
        self.device.default.queue_deciding(compute)

    def read_letters(self, step: Step, layer: int, number: int, times: Times) -> None:
        mine = [its for its in self.posted if its.load.layer == layer]
        self.posted = [its for its in self.posted if its.load.layer != layer]
        for letter in mine:
            if letter.step != number:
                self.seen["letters too late"] += 1
                continue
            if self.acquires:
                join(times, letter.times)
            step.join(letter.load)
            self.seen["joined" if letter.load in self.begun_before else "begun and joined"] += 1

    def page_in(self, layer: int, expert: int, frame: int, times: Times) -> None:
        block = self.tier.blocks[self.tier.block_table()[layer, expert]]
        cells = self.cells(frame)
        cells[:] = expert_number(layer, expert)
        where = {"reads": [bytes_of(block)], "writes": [bytes_of(cells)]}
        self.device.note(f"page-in of {layer}.{expert}", "compute", times, **where)

    def read(self, step: Step, layer: int, expert: int, times: Times) -> None:
        owners = step.sets.owners[layer, : step.sets.sizes[layer]].tolist()
        cells = self.cells(int(step.sets.frames[layer, owners.index(expert)]))
        what, number = f"layer {layer} of {expert}", expert_number(layer, expert)
        self.device.note(what, "compute", times, reads=[bytes_of(cells)])
        if not cells.eq(number).all():
            self.wrong.append(f"{what} reads {cells.tolist()} for {number}")

    def cells(self, frame: int) -> Any:
        return self.raw.view(-1, GEOMETRY.frame_bytes)[frame, : GEOMETRY.expert_bytes]


class PackedLentServer(LentServer, PackedServer):
    """Host memory has experts packed. Prefetches are decoded behind their copies, misses of the device as they are read."""

    def __init__(self, random: Random, **faults: type):
        super().__init__(random, **faults)
        self.packing = NO_PACKING

    def between_steps(self) -> None:
        pass


KINDS = pytest.mark.parametrize("kind", [LentServer, PackedLentServer], ids=["plain", "packed"])


@KINDS
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_order_of_threads_and_streams_is_a_race(kind: type[LentServer], seed: int) -> None:
    server = run(seed, kind)
    assert server.device.races == []
    assert server.wrong == []


@KINDS
def test_the_runs_meet_all_there_is_to_meet(kind: type[LentServer]) -> None:
    seen: Counter[str] = Counter()
    for seed in range(60):
        seen += run(seed, kind).seen
    met = {
        "lent",
        "not lent",
        "joined",
        "begun and joined",
        "letters too late",
        "used",
        "late",
        "wasted",
    }
    assert met <= set(seen)


# ----------------------------------------------------------------- what would go wrong without each


class Relaxed(LentServer):
    """A letter's count is read without an acquire."""

    acquires = False


class ReadsAll(LentServer):
    """Letters of other steps too."""

    def read_letters(self, step: Step, layer: int, number: int, times: Times) -> None:
        self.posted = [its._replace(step=number) for its in self.posted if its.step > 0]
        super().read_letters(step, layer, number, times)


class Impatient(LentServer):
    """The host takes frames back while the step runs."""

    def wait_for_the_step(self) -> None:
        pass


def goes_wrong(seed: int, kind: type[LentServer]) -> bool:
    try:
        server = run(seed, kind)
    except (AssertionError, KeyError, IndexError):
        return True
    return bool(server.device.races or server.wrong)


@pytest.mark.parametrize("kind", [Relaxed, ReadsAll, Impatient])
def test_each_part_of_the_protocol_is_needed(kind: type[LentServer]) -> None:
    assert any(goes_wrong(seed, kind) for seed in range(60))


class DecodesBeside(PackedLentServer, OnAnotherStream):
    """A letter is posted when an expert has been copied, whether it has been decoded or not."""


def test_a_letter_has_to_wait_for_what_decodes() -> None:
    races = {race for seed in range(60) for race in run(seed, DecodesBeside).device.races}
    assert any("layer " in race and "decode on decoder" in race for race in races)


class PrefetchForgets(Stream):
    """Waits for no event on the stream that prefetches: of what was queued before the step."""

    def wait_event(self, event: Any) -> None:
        if self.name != "prefetch":
            super().wait_event(event)


def test_a_prefetch_has_to_wait_for_what_was_queued_before_the_step() -> None:
    assert any(
        run(seed, LentServer, make_stream=PrefetchForgets).device.races for seed in range(60)
    )
