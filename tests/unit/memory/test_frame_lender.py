"""Frames lent to steps without the host: 8 frames, 2 layers of 4 experts; what the device does is `step_without_host`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefetched_memory import Memory, tiny_geometry
from step_without_host import PageIn, Step, run_step

from sglmoe.config import MemoryPolicy
from sglmoe.memory.expert_values import Values
from sglmoe.memory.experts import Load
from sglmoe.memory.frame_lender import QUOTA_STEPS
from sglmoe.memory.frame_sets import USED, Counts, FrameSets, plan_quotas
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.prefetch import Arrival


def lend(memory: MemoryManager, least: int = 1) -> FrameSets:
    memory.begin_step()
    sets = memory.lend(least)
    assert sets is not None
    assert memory.violations() == []
    return sets


def step(memory: MemoryManager, *routed: set[int], least: int = 1) -> list[PageIn]:
    """A whole step without the host, whose layers use these; what was paged in."""
    outcome = run_step(lend(memory, least), routed)
    memory.take_back(outcome.sets)
    assert memory.violations() == []
    assert not outcome.shortfall
    return outcome.page_ins


def set_sizes(memory: MemoryManager, least: int = 1) -> list[int]:
    """Of a step that is not taken."""
    sets = lend(memory, least)
    memory.take_back(sets)
    return sets.sizes.tolist()


def cache(memory: MemoryManager, num_frames: int) -> None:
    """A prefix of so many frames, which nobody uses any more."""
    start(memory, num_frames)
    memory.release("r", prompt(num_frames), 8 * num_frames)


def start(memory: MemoryManager, num_frames: int) -> None:
    """A running request of so many frames."""
    memory.admit("r", prompt(num_frames), "")
    assert memory.extend("r", 8 * num_frames)


def prompt(num_frames: int) -> bytes:
    return np.arange(8 * num_frames, dtype=np.int32).tobytes()


def hits_and_misses(memory: MemoryManager) -> tuple[int, int]:
    now = memory.snapshot(0)
    return now.expert_hits, now.expert_misses


def test_a_step_without_the_host() -> None:
    memory = Memory(policy=MemoryPolicy.LRU)
    start(memory, 3)  # frames 0 to 2
    memory.run(0, 0, 1)  # frames 3 and 4
    memory.run(1, 2)  # frame 5
    assert hits_and_misses(memory) == (0, 3)

    sets = lend(memory, least=2)
    # Frames 6 and 7 are free: layer 1 lacks one to have two, the other goes to the first in turn.
    assert sets.sizes.tolist() == [3, 2]
    assert sets.frames.tolist() == [[3, 4, 6, -1], [5, 7, -1, -1]]
    assert sets.owners.tolist() == [[0, 1, -1, -1], [2, -1, -1, -1]]

    # Layer 0 used 1 and brought 3 to the empty place; layer 1 brought 0 there, and 1 to where 2 was.
    owners = np.array([[0, 1, 3, -1], [1, 0, -1, -1]], np.int32)
    keys = sets.keys.copy()
    keys[0, 1:3] = keys[1, :2] = USED
    memory.take_back(FrameSets(sets.sizes, sets.frames, owners, keys))
    assert memory.violations() == []
    assert memory.frame_table.tolist() == [[3, 4, -1, 6], [7, 5, -1, -1]]
    assert hits_and_misses(memory) == (1, 6)
    snapshot = memory.snapshot(0)
    assert (snapshot.experts_evicted, snapshot.free_frames) == (1, 0)
    assert snapshot.expert_bytes_moved == 6 * 90
    # Of all, 0 of layer 0 alone was not used: it goes when the request needs a frame.
    assert memory.extend("r", 32)
    assert memory.residents() == ["0.1", "0.3", "1.0", "1.1"]


def test_the_device_gets_what_it_needs_to_evict_by_policy() -> None:
    memory = Memory(policy=MemoryPolicy.LRU)
    start(memory, 4)
    memory.run(0, 3, 1)
    memory.run(1, 0)
    memory.run(0, 2)
    memory.run(0, 1)
    assert step(memory, {0}, {0}, least=1) == [PageIn(0, 0, 4)]
    # 3 was used longest ago; its place, not 1's or 2's, is expert 0's now.
    assert memory.residents() == ["0.0", "0.1", "0.2", "1.0"]


@pytest.mark.parametrize("policy", [its for its in MemoryPolicy if its is not MemoryPolicy.STATIC])
def test_memory_learns_what_each_layer_has_used(policy: MemoryPolicy) -> None:
    memory = Memory(policy=policy)
    start(memory, 2)
    memory.run(0, 0, 1)
    memory.run(1, 0, 1)
    for _ in range(2):
        assert step(memory, {1}, {0}) == []
    assert memory.extend("r", 8 * 6)
    assert memory.residents() == ["0.1", "1.0"]


def test_what_a_step_did_not_fill_is_free_again() -> None:
    memory = Memory()
    sets = lend(memory)
    assert sets.sizes.tolist() == [4, 4]
    owners, keys = np.array([[2, -1, -1, -1]] * 2), np.array([[USED, 0, 0, 0]] * 2)
    memory.take_back(FrameSets(sets.sizes, sets.frames, owners, keys))
    assert memory.violations() == []
    assert memory.residents() == ["0.2", "1.2"]
    assert memory.snapshot(0).free_frames == 6


@pytest.mark.parametrize("policy", list(MemoryPolicy))
@settings(max_examples=30)
@given(
    num_frames=st.integers(3, 6),
    routes=st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=3), max_size=12),
)
def test_within_a_layer_the_device_replaces_whom_waves_would(
    policy: MemoryPolicy, num_frames: int, routes: list[set[int]]
) -> None:
    by_waves, lent = (
        MemoryManager(
            tiny_geometry(num_frames + 1, expert_bytes=90),
            num_layers=1,
            num_experts=6,
            floor_frames=num_frames,
            load_experts=lambda loads: None,
            policy=policy,
            expert_ratio=num_frames / (num_frames + 0.5),
        )
        for _ in range(2)
    )
    for memory in (by_waves, lent):
        start(memory, 1)
    for routed in routes:
        by_waves.begin_step()
        assert len(list(by_waves.waves(0, sorted(routed)))) == 1
        step(lent, routed, least=3)
        assert ((lent.frame_table < 0) == (by_waves.frame_table < 0)).all()
    assert hits_and_misses(lent) == hits_and_misses(by_waves)


# --------------------------------------------------------------------------------- who has how many frames


def test_without_enough_frames_nothing_is_lent_and_nobody_evicted() -> None:
    memory = Memory()
    memory.run(0, 0, 1)
    start(memory, 5)
    assert memory.lend(2) is None
    assert memory.residents() == ["0.0", "0.1"]
    assert memory.snapshot(0).free_frames == 1
    assert memory.run(1, 0, 1) == [[0, 1]]  # by waves, then
    assert set_sizes(memory, 1) == [1, 2]


@pytest.mark.parametrize("floor_frames", [2, 4])
def test_prefixes_leave_every_layer_what_a_step_takes_where_that_is_the_floor(
    floor_frames: int,
) -> None:
    """Two experts a layer; prefixes are worth more than any, and so many come that they would take all frames."""
    memory = Memory(floor_frames=floor_frames)
    memory.set_prices(expert_nanoseconds=1, token_nanoseconds=10**9)
    for number in range(8):
        tokens = np.full(8, number, np.int32).tobytes()
        memory.admit("r", tokens, "")
        assert memory.extend("r", 8)
        memory.release("r", tokens, 8)
    memory.begin_step()
    memory.run(0, 0, 1)  # takes no prefix's frame
    assert memory.snapshot(0).kv_frames == 8 - floor_frames
    if floor_frames == 2:  # the experts of one layer, as where nothing is lent
        assert memory.lend(2) is None
        return
    assert memory.want("0.2") == 1  # and has a spare one
    assert step(memory, {0, 1}, {0, 1}, least=2) == [PageIn(1, 0, 6), PageIn(1, 1, 7)]
    assert memory.snapshot(0).kv_frames == 4


def test_the_least_is_no_more_than_a_layer_has_experts() -> None:
    memory = Memory()
    assert set_sizes(memory, 99) == [4, 4]
    start(memory, 1)
    assert memory.lend(99) is None


def test_a_layer_that_has_too_few_takes_frames_of_others() -> None:
    memory = Memory()
    start(memory, 3)
    memory.run(1, 0)
    for _ in range(3):
        memory.begin_step()
        memory.run(0, 0, 2, 3)
        memory.run(0, 1)
    memory.run(1, 0)
    assert set_sizes(memory, 2) == [3, 2]
    # Of the others 1 was used as often, and 0 is the first of equals.
    assert memory.residents() == ["0.1", "0.2", "0.3", "1.0"]
    assert memory.snapshot(0).experts_evicted == 1


def test_frames_go_from_layer_to_layer_as_these_miss() -> None:
    """Layer 0 always uses expert 0; layer 1 all of its own in turns, two a step. Five frames."""
    memory = Memory()
    start(memory, 3)
    assert set_sizes(memory, 2) == [3, 2]
    step(memory, {0}, {0, 1}, least=2)
    step(memory, {1, 2}, {2, 3}, least=2)
    assert memory.residents() == ["0.0", "0.1", "0.2", "1.2", "1.3"]
    for number in range(40):
        step(memory, {0}, {0, 1} if number % 2 else {2, 3}, least=1)
    assert memory.residents() == ["0.0", "1.0", "1.1", "1.2", "1.3"]
    misses = hits_and_misses(memory)[1]
    step(memory, {0}, {0, 1, 2, 3})
    assert hits_and_misses(memory)[1] == misses


def test_layers_that_use_as_much_have_as_many_frames() -> None:
    memory = Memory()
    start(memory, 2)
    for _ in range(3):
        step(memory, {0}, {0})
    # The first layer's experts are nearer, and those of both as likely.
    assert set_sizes(memory) == [3, 3]


def test_quotas_are_made_anew_where_they_give_a_layer_too_few() -> None:
    memory = Memory()
    start(memory, 3)
    for _ in range(5):
        memory.begin_step()
        memory.run(0, 0, 1, 2, 3)
        memory.run(1, 0)
    assert set_sizes(memory, 1) == [4, 1]
    assert set_sizes(memory, 2) == [3, 2]


def test_quotas_last_for_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, num_made = Memory(), 0

    def counted(values: Values, num_frames: int, least: int) -> Counts:
        nonlocal num_made
        num_made += 1
        return plan_quotas(values, num_frames, least)

    monkeypatch.setattr("sglmoe.memory.frame_lender.plan_quotas", counted)
    for _ in range(QUOTA_STEPS):
        step(memory, {0}, {0})
    assert num_made == 1
    step(memory, {0}, {0})
    assert num_made == 2


def test_prefixes_that_are_worth_less_make_way_for_as_many_misses_as_there_were() -> None:
    memory = Memory()
    cache(memory, 6)
    step(memory, {0}, {0})
    memory.set_prices(expert_nanoseconds=1, token_nanoseconds=10**9)
    assert step(memory, {1}, {1}) == [PageIn(0, 1, 6), PageIn(1, 1, 7)]  # nothing makes way
    assert step(memory, {2}, {2}) == [PageIn(0, 2, 6), PageIn(1, 2, 7)]
    assert step(memory, {2}, {2}) == []  # nor have these made way
    assert memory.snapshot(0).kv_frames == 6
    memory.set_prices(expert_nanoseconds=10**9, token_nanoseconds=1)
    step(memory, {0}, {0})
    assert set_sizes(memory) == [2, 2]  # two have missed
    assert memory.snapshot(0).kv_frames == 4
    assert set_sizes(memory) == [2, 2]  # nobody has
    for routed in ({0, 1}, {2, 3}, {0, 1}, {2, 3}):
        step(memory, routed, routed, least=2)
    assert memory.snapshot(0).kv_frames == 0
    assert len(memory.residents()) == 8


def test_prefixes_stay_where_every_expert_has_a_frame() -> None:
    memory = Memory(num_frames=10)
    memory.set_prices(expert_nanoseconds=10**9, token_nanoseconds=1)
    cache(memory, 2)
    for _ in range(3):
        step(memory, {0, 1, 2, 3}, {0, 1, 2, 3}, least=4)
    assert memory.snapshot(0).kv_frames == 2


def test_each_layer_has_its_share() -> None:
    memory = Memory(policy=MemoryPolicy.STATIC)
    assert set_sizes(memory, 2) == [2, 2]
    assert memory.lend(3) is None
    step(memory, {0, 1}, {2}, least=2)
    assert step(memory, {1}, {0, 1}, least=2) == [PageIn(1, 0, 3), PageIn(1, 1, 2)]
    assert memory.residents() == ["0.0", "0.1", "1.0", "1.1"]
    memory.begin_step()
    assert memory.want("0.2") == 1  # takes the frame of 0
    assert memory.lend(2) is None
    assert set_sizes(memory, 1) == [1, 2]


# --------------------------------------------------------------------------------------------- prefetches


def test_frames_on_their_way_are_lent_to_nobody() -> None:
    memory = Memory()
    memory.begin_step()
    assert memory.want("0.1") == 1
    sets = memory.lend(1)
    assert sets is not None
    assert 0 not in sets.frames
    assert sets.sizes.tolist() == [4, 3]
    memory.background_loads.arrive()
    outcome = run_step(sets, [{0}, {0}])
    memory.take_back(outcome.sets)
    assert memory.residents() == ["0.0", "0.1", "1.0"]
    assert memory.counts() == (1, 0, 0, 0)
    assert step(memory, {1}, {0}) == []
    assert memory.counts() == (1, 1, 0, 0)


@pytest.mark.parametrize("has_arrived", [False, True])
def test_whoever_was_on_its_way_and_paged_in_meanwhile_is_given_up(has_arrived: bool) -> None:
    memory = Memory()
    memory.begin_step()
    memory.want("1.2")
    sets = memory.lend(1)
    assert sets is not None
    if has_arrived:
        memory.background_loads.arrive()
    outcome = run_step(sets, [{0}, {2}])
    memory.take_back(outcome.sets)
    assert memory.violations() == []
    assert memory.background_loads.log == ["cancel 1.2"]
    assert memory.counts() == (1, 0, 0, 1)
    assert memory.residents() == ["0.0", "1.2"]


def test_what_was_for_a_step_that_has_passed_is_given_up() -> None:
    memory = Memory()
    memory.begin_step()
    memory.want("0.1", "1.1")
    sets = memory.lend(1)
    assert sets is not None
    memory.take_back(sets)
    assert memory.background_loads.log == ["cancel 0.1", "cancel 1.1"]
    memory.want("0.1", "1.1")  # for the next one, to which they are not late
    memory.begin_step()
    memory.run(0, 0)
    assert memory.num_on_their_way == 2
    memory.run(1, 0)
    assert memory.background_loads.log[2:] == ["cancel 0.1"]


def test_prefetches_give_their_frames_up_before_the_least_is_short() -> None:
    memory = Memory()
    start(memory, 4)
    memory.begin_step()
    memory.want("0.0", "1.0", "1.1")
    assert memory.lend(3) is None
    assert memory.background_loads.log == []
    assert memory.lend(1) is not None
    assert memory.background_loads.log == ["cancel 1.1"]


def test_a_prefetched_resident_that_goes_unused_is_wasted() -> None:
    memory = Memory(num_frames=3)
    start(memory, 1)
    memory.want("0.1", "1.1")
    memory.background_loads.arrive()
    memory.background_loads.arrive()
    step(memory, {0}, {1})
    assert memory.residents() == ["0.0", "1.1"]
    assert memory.counts() == (2, 1, 0, 1)


# ------------------------------------------------------------------------------------ while frames are lent


def test_a_layer_that_was_left_in_the_middle_has_neither_pins_nor_loads() -> None:
    memory = Memory(policy=MemoryPolicy.LRU)
    start(memory, 6)
    memory.run(0, 0)
    memory.run(1, 0)
    layer = memory.waves(0, [0])
    next(layer)
    sets = memory.lend(1)
    assert sets is not None
    outcome = run_step(sets, [{1}, {0}])
    memory.take_back(outcome.sets)
    assert memory.residents() == ["0.1", "1.0"]
    assert memory.violations() == []


def test_while_frames_are_lent_none_changes_hands() -> None:
    memory = Memory()
    memory.run(0, 0)
    memory.admit("r", prompt(1), "")
    sets = lend(memory)
    for attempt in (
        lambda: list(memory.waves(0, [0])),
        lambda: memory.extend("r", 8),
        lambda: memory.lend(1),
        memory.clear,
    ):
        with pytest.raises(AssertionError):
            attempt()
    memory.take_back(sets)
    assert memory.violations() == []
    with pytest.raises(AssertionError, match="nothing is lent"):
        memory.take_back(sets)


# ------------------------------------------------------------------------- prefetches that come while it runs


def lend_with_spare(memory: Memory, *, num_ahead: int = 1) -> Step:
    """Experts 0 and 1 of each layer are resident, and a request has three of the eight frames."""
    start(memory, 3)
    memory.run(0, 0, 1)
    memory.run(1, 0, 1)
    memory.begin_step()
    sets = memory.lend(2, num_ahead)
    assert sets is not None
    return Step(sets)


def prefetch(memory: Memory, key: str) -> Load:
    assert memory.want(key) == 1
    return memory.background_loads.under_way[-1]


def test_spare_frames_are_in_no_set_and_free_again_if_nothing_came() -> None:
    memory = Memory()
    step = lend_with_spare(memory)
    assert step.sets.sizes.tolist() == [2, 2]  # frame 7 is spare
    memory.take_back(step.sets)
    assert memory.violations() == []
    assert memory.snapshot(0).free_frames == 1
    assert set_sizes(memory) == [3, 2]


def test_what_is_spare_is_taken_from_whoever_is_worth_least_but_not_from_the_least_of_a_layer() -> (
    None
):
    memory = Memory()
    start(memory, 4)
    memory.run(0, 0, 1)
    memory.run(1, 2, 3)
    memory.begin_step()
    assert memory.lend(2, 1) is not None  # each has two, and there is no other frame
    assert memory.want("1.0") == 0


def test_a_prefetch_that_comes_in_time_joins_and_is_used() -> None:
    memory = Memory()
    step = lend_with_spare(memory)
    load = prefetch(memory, "1.2")
    assert memory.want("1.3") == 0  # there is one spare frame
    memory.background_loads.arrive()
    step.compute(0, {0})
    step.join(load)
    step.compute(1, {0, 2})
    memory.take_back(step.sets)
    assert memory.violations() == []
    assert step.page_ins == []
    assert memory.residents() == ["0.0", "0.1", "1.0", "1.1", "1.2"]
    assert memory.counts() == (1, 1, 0, 0)
    assert hits_and_misses(memory) == (3, 4)


def test_one_that_joins_and_is_not_used_is_a_resident_that_nothing_has_used() -> None:
    memory = Memory()
    step = lend_with_spare(memory)
    step.join(prefetch(memory, "1.2"))
    memory.take_back(step.sets)
    assert memory.residents() == ["0.0", "0.1", "1.0", "1.1", "1.2"]
    assert memory.counts() == (1, 0, 0, 0)
    assert memory.run(1, 2) == [[2]]
    assert memory.counts() == (1, 1, 0, 0)


def test_the_frame_of_one_that_joined_may_be_anothers_by_now() -> None:
    memory = Memory()
    step = lend_with_spare(memory)
    load = prefetch(memory, "1.2")
    step.join(load)
    step.compute(1, {0, 1, 3})
    assert step.page_ins == [PageIn(1, 3, load.frame)]
    memory.take_back(step.sets)
    assert memory.violations() == []
    assert memory.frame_table[1].tolist()[2:] == [-1, load.frame]
    assert memory.counts() == (1, 0, 0, 1)


def test_one_that_a_miss_has_brought_in_first_leaves_an_empty_place() -> None:
    memory = Memory()
    step = lend_with_spare(memory)
    load = prefetch(memory, "1.2")
    step.compute(1, {0, 2})
    step.join(
        load
    )  # a later boundary would have to be another step's; the device's order is no concern here
    memory.take_back(step.sets)
    assert memory.violations() == []
    assert memory.residents() == ["0.0", "0.1", "1.0", "1.2"]
    assert memory.snapshot(0).free_frames == 1
    assert memory.counts() == (1, 0, 0, 1)


def test_a_layer_whose_set_would_be_full_gets_no_prefetch() -> None:
    memory = Memory(num_frames=16)
    memory.run(0, 0, 1)
    memory.begin_step()
    sets = memory.lend(1, 1)
    assert sets is not None
    assert sets.sizes.tolist() == [4, 4]
    assert memory.want("0.2") == 0
    memory.take_back(sets)
    assert memory.violations() == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_comes_whenever_memory_is_true_again(data: st.DataObject) -> None:
    """Frames hold what memory says they do; what came is where it was brought."""
    memory = Memory(policy=data.draw(st.sampled_from(list(MemoryPolicy))))
    if data.draw(st.booleans()):
        start(memory, data.draw(st.integers(1, 3)))
    held: dict[int, tuple[int, int]] = {}
    coming = memory.background_loads.under_way
    for _ in range(data.draw(st.integers(1, 4))):
        memory.begin_step()
        sets = memory.lend(data.draw(st.integers(1, 2)), data.draw(st.integers(0, 2)))
        if sets is None:
            continue
        step, since_lent = Step(sets), list(coming)
        for layer in range(2):
            key = f"{data.draw(st.integers(0, 1))}.{data.draw(st.integers(0, 3))}"
            since_lent += coming[len(coming) :] if memory.want(key) == 0 else [coming[-1]]
            came = data.draw(st.lists(st.sampled_from(since_lent or [None]), unique=True))
            for load in filter(None, came):
                held[load.frame] = load.layer, load.expert
                since_lent.remove(load)
                coming.remove(load)
                memory.background_loads.ended.append(Arrival(load, is_there=True))
                if load.layer >= layer and data.draw(st.booleans()):
                    step.join(load)
            step.compute(layer, data.draw(st.sets(st.integers(0, 3), min_size=1, max_size=2)))
        for layer, expert, frame in step.page_ins:
            held[frame] = layer, expert
        memory.take_back(step.sets)
        assert memory.violations() == []
        for layer, expert in np.argwhere(memory.frame_table >= 0).tolist():
            assert held[int(memory.frame_table[layer, expert])] == (layer, expert)
        now = memory.snapshot(0)
        num_ended = now.prefetches_begun - memory.num_on_their_way
        assert num_ended >= now.prefetches_used + now.prefetches_wasted


def test_a_spare_frame_is_made_where_all_are_in_use() -> None:
    memory = Memory()
    memory.run(0, 0, 1, 2, 3)
    memory.run(1, 0, 1, 2, 3)
    memory.begin_step()
    for _ in range(2):  # by new quotas, and by those of the step before
        sets = memory.lend(1, 1)
        assert sets is not None
        assert sets.sizes.sum() == 7
        memory.take_back(sets)
    assert memory.snapshot(0).experts_evicted == 1
