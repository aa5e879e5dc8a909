"""Host memory fills in the background and gives way to demand loads: 2 layers of 4 experts, 4 blocks."""

import logging
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from sglmoe.memory.host_tier import HostTier
from sglmoe.memory.link_gate import LinkGate
from sglmoe.memory.promoter import LOG_SECONDS, Promoter
from sglmoe.memory.store import Bytes, ExpertReadError, ExpertStore

WAIT_SECONDS = 10.0  # far more than anything here takes


class Disk(ExpertStore):
    """Expert (l, e) is 6 bytes 10 l + e, in two chunks; `before_read` may fail or wait."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[int, int]] = []
        self.before_read: Callable[[int, int], None] = lambda layer, expert: None

    def read(
        self,
        layer: int,
        expert: int,
        target: Bytes,
        *,
        before_chunk: Callable[[], None] | None = None,
    ) -> int:
        assert before_chunk is not None
        self.reads.append((layer, expert))
        self.before_read(layer, expert)
        for start in (0, 3):
            before_chunk()
            target[start : start + 3] = 10 * layer + expert
        return 6


class Bench:
    def __init__(self) -> None:
        self.disk = Disk()
        self.gate = LinkGate()
        self.tier = HostTier(np.zeros((4, 6), np.uint8), num_layers=2, num_experts=4)
        self.heat = np.zeros((2, 4))
        self.residents = np.zeros((2, 4), np.bool_)
        self.now = 0.0
        self.promoter = Promoter(
            self.tier,
            self.disk,
            self.gate,
            heat=lambda: self.heat,
            residents=lambda: self.residents,
            clock=lambda: self.now,
        )

    def here(self) -> list[tuple[int, int]]:
        assert self.tier.violations() == []
        found = self.tier.snapshot(heat=self.heat, is_resident=self.residents).is_here
        return [(layer, expert) for layer, expert in np.argwhere(found).tolist()]

    def miss(self, layer: int, expert: int, times: int) -> None:
        for _ in range(times):
            block = self.tier.pin(layer, expert)
            if block is not None:
                self.tier.unpin(block)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    assert bench.tier.violations() == []


@pytest.fixture
def running(bench: Bench) -> Iterator[Bench]:
    yield bench
    bench.promoter.close()


def eventually(condition: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(int(WAIT_SECONDS / 0.01)):
        if condition():
            return
        done.wait(0.01)
    raise AssertionError("it did not come to pass")


def test_free_blocks_are_filled_and_then_there_is_nothing_to_do(bench: Bench) -> None:
    bench.heat[1] = [1, 2, 3, 4]
    assert bench.promoter.promote_some() == 4
    assert bench.disk.reads == [(1, 3), (1, 2), (1, 1), (1, 0)]
    assert bench.tier.blocks.tolist() == [[13] * 6, [12] * 6, [11] * 6, [10] * 6]
    assert bench.promoter.promote_some() == 0


def test_an_expert_that_is_missed_often_takes_the_block_of_one_that_stays_in_its_frame(
    bench: Bench,
) -> None:
    bench.promoter.promote_some()
    bench.residents[0, 2] = True
    for expert in (0, 1, 3):
        bench.miss(0, expert, 1)
    bench.miss(1, 3, 2)
    assert bench.promoter.promote_some() == 1
    assert bench.here() == [(0, 0), (0, 1), (0, 3), (1, 3)]
    assert bench.tier.blocks[2].tolist() == [13] * 6


def test_an_expert_that_can_not_be_read_is_left_out_and_the_others_come(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(layer: int, expert: int) -> None:
        if (layer, expert) == (0, 1):
            raise ExpertReadError("expert 1 of MoE layer 0 can't be read from a.safetensors")

    bench.disk.before_read = fail
    assert bench.promoter.promote_some() == 3
    assert bench.here() == [(0, 0), (0, 2), (0, 3)]
    assert "not kept in host memory: expert 1 of MoE layer 0" in caplog.text
    # Another gets the block. The bad one is not tried again and again.
    assert bench.promoter.promote_some() == 1
    assert bench.here() == [(0, 0), (0, 2), (0, 3), (1, 0)]
    assert bench.disk.reads.count((0, 1)) == 1


def test_the_thread_fills_host_memory_and_answers_misses(running: Bench) -> None:
    running.promoter.start()
    eventually(lambda: running.here() == [(0, 0), (0, 1), (0, 2), (0, 3)])
    running.miss(1, 1, 3)
    eventually(lambda: (1, 1) in running.here() and len(running.here()) == 4)


def test_a_demand_load_holds_the_background_up_between_two_chunks(running: Bench) -> None:
    reading = threading.Event()
    running.disk.before_read = lambda layer, expert: reading.set()
    with running.gate.closed():
        running.promoter.start()
        assert reading.wait(WAIT_SECONDS)
        # It stands before the first chunk of the first expert, as long as the demand takes.
        threading.Event().wait(0.1)
        assert running.disk.reads == [(0, 0)]
        assert running.tier.counters()["host_promoted"] == 0
        assert not running.tier.blocks.any()
    eventually(lambda: running.tier.counters()["host_promoted"] == 4)


def test_closing_leaves_the_expert_that_is_being_read(bench: Bench) -> None:
    at_second_expert, go_on = threading.Event(), threading.Event()

    def wait_for_close(layer: int, expert: int) -> None:
        if expert == 1:
            at_second_expert.set()
            assert go_on.wait(WAIT_SECONDS)

    bench.disk.before_read = wait_for_close
    bench.promoter.start()
    assert at_second_expert.wait(WAIT_SECONDS)
    closing = threading.Thread(target=bench.promoter.close)
    closing.start()
    eventually(lambda: bench.promoter._stopping.is_set())
    go_on.set()
    closing.join(WAIT_SECONDS)
    assert bench.here() == [(0, 0)]


def test_a_bug_in_the_background_ends_it_and_nothing_else(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down(layer: int, expert: int) -> None:
        raise KeyError(expert)

    bench.disk.before_read = break_down
    bench.promoter.start()
    bench.promoter._thread.join(WAIT_SECONDS)
    assert "host memory is not filled any further; serving goes on" in caplog.text
    assert bench.here() == []


def test_progress_is_logged_when_host_memory_is_full_and_now_and_then(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    progress = bench.promoter._progress
    bench.promoter.promote_some()
    bench.now += 1.0
    progress.log()
    assert caplog.messages == []
    progress.log(settled=True)
    assert caplog.messages == [
        "host memory: 4 of 4 blocks hold an expert, 24 B read in the background in 1.0 s"
    ]
    bench.miss(1, 0, 3)
    bench.promoter.promote_some()
    progress.log(settled=True)  # a single exchange is no news
    bench.now += LOG_SECONDS
    progress.log(settled=True)
    progress.log(settled=True)
    assert caplog.messages[1:] == [
        "host memory: 4 of 4 blocks hold an expert, 6 B read in the background in 10.0 s"
    ]
