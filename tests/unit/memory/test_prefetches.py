"""Prefetches, as the memory manager lands, promotes and drops them."""

from collections.abc import Sequence

import numpy as np
import pytest
from prefetched_memory import Memory

from sglmoe.config import MemoryPolicy
from sglmoe.memory.experts import Load


@pytest.fixture
def memory() -> Memory:
    return Memory()


def test_what_has_arrived_is_a_hit(memory: Memory) -> None:
    memory.begin_step()
    assert memory.want("1.2") == 1
    assert memory.run(0, 0) == [[0]]
    assert memory.residents() == ["0.0"], "it is on its way"
    memory.background_loads.arrive()
    assert memory.run(1, 2) == [[2]]
    assert memory.demand == ["0.0"]
    assert memory.counts() == (1, 1, 0, 0)
    snapshot = memory.snapshot(0)
    assert (snapshot.expert_hits, snapshot.expert_misses) == (1, 1)
    assert snapshot.expert_bytes_moved == 2 * 90
    # It is an expert like others from now on: used again, it is no prefetch's merit.
    memory.run(1, 2)
    assert memory.counts() == (1, 1, 0, 0)


def test_what_is_resident_or_on_its_way_is_not_begun_again(memory: Memory) -> None:
    memory.run(0, 0)
    assert memory.want("0.0", "1.1") == 1
    assert memory.want("0.0", "1.1") == 0
    assert memory.background_loads.under_way == [Load(1, 1, 1)]


def test_a_layer_waits_for_what_is_on_its_way_and_loads_the_rest(memory: Memory) -> None:
    memory.begin_step()
    memory.run(1, 3)
    memory.begin_step()
    memory.want("1.1")
    assert memory.run(1, 0, 1, 3) == [[3, 0], [1]]
    assert memory.background_loads.log == ["wait for 1.1"]
    assert memory.demand == ["1.3", "1.0"]
    assert memory.counts() == (1, 0, 1, 0)
    assert memory.snapshot(0).expert_misses == 3
    assert memory.snapshot(0).expert_bytes_moved == 3 * 90


def test_a_prefetch_that_fails_leaves_the_expert_to_a_demand_load(memory: Memory) -> None:
    memory.background_loads.fails = True
    memory.want("1.1", "1.2")
    memory.background_loads.arrive(is_there=False)
    assert memory.run(1, 1, 2) == [[1], [2]]
    assert memory.background_loads.log == ["wait for 1.2"]
    assert memory.demand == ["1.1", "1.2"]
    assert memory.counts() == (2, 0, 0, 2)


def test_what_was_for_a_layer_that_has_passed_is_given_up(memory: Memory) -> None:
    memory.begin_step()
    memory.want("0.1", "1.1")
    memory.run(0, 0)
    assert memory.background_loads.log == []
    memory.run(1, 0)
    assert memory.background_loads.log == ["cancel 0.1"]
    memory.begin_step()
    memory.run(0, 0)
    assert memory.background_loads.log == ["cancel 0.1", "cancel 1.1"]
    assert memory.counts() == (2, 0, 0, 2)


def test_after_the_last_layer_it_is_for_the_next_step(memory: Memory) -> None:
    memory.begin_step()
    memory.run(0, 0)
    memory.run(1, 0)
    memory.want("0.1")
    memory.begin_step()
    memory.run(0, 1)
    assert memory.background_loads.log == ["wait for 0.1"]


def test_it_takes_frames_from_what_is_worth_less() -> None:
    memory = Memory(num_frames=3)
    for _ in range(20):  # 0.0 and 1.0 in every step
        memory.begin_step()
        memory.run(0, 0)
        memory.run(1, 0)
    memory.run(1, 3)  # once
    assert memory.residents() == ["0.0", "1.0", "1.3"]
    memory.begin_step()
    assert memory.want("0.2", p=0.001) == 0, "1.3 is likelier to be used"
    assert memory.want("0.1") == 1
    assert memory.residents() == ["0.0", "1.0"]
    assert memory.want("0.2", p=0.5) == 0, "the others are in every step"


def test_one_that_nothing_used_is_wasted_when_it_goes() -> None:
    memory = Memory(num_frames=3)
    memory.begin_step()
    memory.want("1.1")
    memory.background_loads.arrive()
    memory.run(0, 0)
    memory.begin_step()
    memory.run(0, 0, 1, 2)
    assert memory.residents() == ["0.0", "0.1", "0.2"]
    assert memory.counts() == (1, 0, 0, 1)


def test_demand_takes_frames_from_what_is_on_its_way() -> None:
    memory = Memory(num_frames=3)
    memory.begin_step()
    assert memory.want("1.0", "1.1", "1.2") == 3
    assert memory.run(0, 0, 1) == [[0, 1]]
    assert memory.background_loads.log == ["cancel 1.2", "cancel 1.1"]
    assert memory.run(1, 0) == [[0]]


def test_pages_of_requests_take_frames_from_what_is_on_its_way() -> None:
    memory = Memory(num_frames=3)
    memory.want("1.0", "1.1", "1.2")
    memory.admit("a", b"", "")
    assert memory.extend("a", 16)
    assert memory.background_loads.log == ["cancel 1.2", "cancel 1.1"]
    assert not memory.extend("a", 24), "one frame stays for experts"
    assert memory.violations() == []


def test_a_guess_costs_nobody_a_prefix() -> None:
    memory = Memory(num_frames=3)
    text = np.arange(8, dtype=np.int32).tobytes()
    memory.admit("a", text, "")
    assert memory.extend("a", 8)
    memory.release("a", text, 8)
    memory.set_prices(expert_nanoseconds=10**9, token_nanoseconds=1)
    memory.begin_step()
    assert memory.want("1.0", "1.1", "1.2") == 2, "the free frames"
    assert memory.probe(text, "") == 8
    memory.run(0, 0, 1, 2)
    assert memory.probe(text, "") == 0, "what is needed does"


def test_leaving_a_layer_that_is_over_takes_no_pin_of_another() -> None:
    memory = Memory(num_frames=3)
    memory.begin_step()
    over = memory.waves(0, [0])
    next(over)
    running = memory.waves(1, [0])
    next(running)
    over.close()
    memory.admit("a", b"", "")
    assert memory.extend("a", 16)
    assert memory.residents() == ["1.0"]


def test_time_that_late_ones_took_is_told_apart(memory: Memory) -> None:
    memory.begin_step()
    memory.run(0, 0)
    assert memory.snapshot(0).late_seconds == 0
    memory.want("1.1")
    memory.background_loads.seconds = 0.003
    memory.run(1, 1)
    snapshot = memory.snapshot(0)
    assert snapshot.stall_seconds >= snapshot.late_seconds >= 0.003


def test_a_static_share_is_no_larger_for_prefetches() -> None:
    memory = Memory(policy=MemoryPolicy.STATIC)  # 2 frames for each layer
    memory.begin_step()
    memory.run(1, 0, 1)
    memory.run(0, 0)
    assert memory.want("1.2", p=0.1) == 0, "it was never used, those that have the frames were"
    assert memory.want("1.2", "1.3") == 2
    assert memory.residents() == ["0.0"]
    assert memory.want("1.0") == 0, "the layer's frames are taken"
    assert memory.run(1, 0, 2) == [[0], [2]]
    assert memory.background_loads.log == ["cancel 1.3", "wait for 1.2"]


def test_clearing_gives_up_what_is_on_its_way(memory: Memory) -> None:
    memory.want("0.1", "1.1")
    memory.background_loads.arrive()
    memory.clear()
    assert memory.residents() == []
    assert memory.background_loads.under_way == []
    assert memory.snapshot(0).free_frames == 8


@pytest.mark.parametrize("policy", [MemoryPolicy.LRU, MemoryPolicy.LFU])
def test_what_is_expected_outlives_what_was_used(policy: MemoryPolicy) -> None:
    memory = Memory(num_frames=3, policy=policy)
    memory.begin_step()
    memory.run(0, 0)
    memory.run(1, 0, 1)
    memory.begin_step()
    memory.expect(-1, np.array([[1, 0, 0, 0], [0, 1, 0, 0]]))
    memory.run(0, 0, 1)  # takes the frame of 1.0; by age or count alone 1.0 and 1.1 are alike
    assert memory.residents() == ["0.0", "0.1", "1.1"]


# ------------------------------------------------------------------- loads that take their time


class SlowMemory(Memory):
    """Demand loads are there when somebody waits for them."""

    fails = False

    def _demand(self, loads: Sequence[Load]) -> "object":  # type: ignore[override]
        super()._demand(loads)
        return self._finish

    def _finish(self) -> float:
        self.demand.append("there")
        if self.fails:
            raise OSError("the disk is gone")
        return 0.25


def test_residents_run_while_the_others_come() -> None:
    memory = SlowMemory()
    memory.run(0, 1, 2)
    memory.demand.clear()
    waves = memory.waves(0, [0, 1, 2])
    assert next(waves).tolist() == [1, 2]
    assert memory.demand == ["0.0"]
    assert memory.violations() == []
    assert next(waves).tolist() == [0]
    assert memory.demand == ["0.0", "there"]
    assert next(waves, None) is None
    snapshot = memory.snapshot(0)
    assert snapshot.num_waves == 2, "both are of the same wave of loads"
    assert snapshot.load_seconds == pytest.approx(0.5), "twice"
    assert snapshot.stall_seconds < 0.25, "nobody waited"


def test_residents_run_while_late_prefetches_and_loads_come() -> None:
    memory = SlowMemory()
    memory.begin_step()
    memory.run(1, 3)
    memory.demand.clear()
    memory.want("1.1")
    waves = memory.waves(1, [0, 1, 3])
    assert next(waves).tolist() == [3]
    assert memory.demand == ["1.0"]
    assert memory.background_loads.promoted == [Load(1, 1, 1)]
    assert memory.background_loads.log == []
    assert memory.violations() == []
    assert next(waves).tolist() == [1, 0]
    assert memory.demand == ["1.0", "there"]
    assert memory.background_loads.log == ["wait for 1.1"]
    assert next(waves, None) is None
    assert memory.counts() == (1, 0, 1, 0)


def test_nobody_takes_the_frame_of_a_late_prefetch() -> None:
    memory = SlowMemory(num_frames=3)
    memory.begin_step()
    memory.want("0.0", "1.0", "1.1")
    waves = memory.waves(0, [0, 1])  # takes the frame of 1.1
    assert next(waves).tolist() == [0, 1]
    assert memory.background_loads.log == ["cancel 1.1", "wait for 0.0"]
    assert memory.want("1.1", "1.2") == 0, "1.0 is on its way, the others run"
    memory.begin_step()
    memory.run(1, 0, 2)
    memory.want("0.3")
    waves = memory.waves(0, [2, 3])
    assert memory.want("1.3") == 0
    assert sorted(next(waves).tolist()) == [2, 3]
    assert memory.violations() == []


def test_a_load_that_fails_leaves_no_late_prefetch_behind() -> None:
    memory = SlowMemory()
    memory.begin_step()
    memory.want("0.0")
    memory.fails = True
    with pytest.raises(OSError, match="the disk is gone"):
        next(memory.waves(0, [0, 1]))
    assert memory.background_loads.log == ["wait for 0.0"]
    assert memory.residents() == ["0.0"]
    assert memory.violations() == []
    assert memory.counts() == (1, 0, 1, 0)


@pytest.mark.parametrize("leave", ["close", "forget"])
def test_a_layer_that_is_left_has_its_late_prefetches_ended(leave: str) -> None:
    memory = SlowMemory()
    memory.run(0, 1)
    memory.begin_step()
    memory.want("0.0")
    waves = memory.waves(0, [0, 1])
    assert next(waves).tolist() == [1]
    if leave == "close":
        waves.close()
    else:
        memory.begin_step()
    assert memory.background_loads.log == ["wait for 0.0"]
    assert memory.residents() == ["0.0", "0.1"]
    assert memory.violations() == []


def test_what_runs_in_the_end_is_nobodys_victim() -> None:
    memory = SlowMemory(num_frames=3)
    memory.begin_step()
    memory.run(1, 0)
    waves = memory.waves(0, [0, 1])
    assert next(waves).tolist() == [0, 1]
    assert memory.want("1.1", "1.2", "1.3") == 1, "1.0 may give way, the others run"
    assert memory.residents() == ["0.0", "0.1"]


@pytest.mark.parametrize("leave", ["close", "forget"])
def test_a_layer_that_is_left_has_its_loads_ended(leave: str) -> None:
    memory = SlowMemory()
    memory.run(0, 1)
    waves = memory.waves(0, [0, 1])
    next(waves)
    if leave == "close":
        waves.close()
    else:
        memory.begin_step()
    assert memory.demand[-2:] == ["0.0", "there"]
    assert memory.residents() == ["0.0", "0.1"]
    assert memory.violations() == []
    assert memory.run(1, 0) == [[0]]


def test_pages_wait_for_no_load_of_a_layer_that_was_left() -> None:
    memory = SlowMemory(num_frames=3)
    memory.run(0, 0)
    waves = memory.waves(0, [0, 1])
    next(waves)
    memory.admit("a", b"", "")
    assert not memory.extend("a", 16), "a frame is pinned, another one is being filled"
    assert memory.extend("a", 8)
    memory.begin_step()
    assert memory.extend("a", 16)


def test_a_load_that_fails_in_the_end_leaves_nothing() -> None:
    memory = SlowMemory()
    memory.run(0, 1)
    memory.fails = True
    waves = memory.waves(0, [0, 1])
    assert next(waves).tolist() == [1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(waves)
    assert memory.residents() == ["0.1"]
    assert memory.violations() == []
    waves = memory.waves(0, [0, 1])
    next(waves)
    memory.begin_step()  # nobody waits for it any more: that it fails is nobody's concern
    assert memory.residents() == ["0.1"]
    assert memory.violations() == []
