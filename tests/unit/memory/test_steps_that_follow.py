"""Steps without the host that begin before memory has heard of the ones in front of them: they share what was lent.

8 frames of two pages of 4 tokens, or of an expert; 2 layers of 4 experts.
"""

import numpy as np
import pytest
from prefetched_memory import Memory
from step_without_host import run_step, sets_behind


def start(memory: Memory, rid: str, num_tokens: int) -> None:
    memory.admit(rid, np.arange(num_tokens, dtype=np.int32).tobytes(), rid)  # nobody shares
    assert memory.extend(rid, num_tokens)


def test_each_step_is_told_as_it_was_though_the_next_one_has_run() -> None:
    memory = Memory()
    start(memory, "r", 24)  # three frames
    memory.begin_step()
    sets = memory.lend(2)
    assert sets is not None
    assert sets.sizes.tolist() == [3, 2]
    first = run_step(sets, [{0, 1}, {0, 1}])
    assert sets.expert_keys is not None
    behind = sets_behind(first, sets.expert_keys)
    second = run_step(behind, [{1, 2}, {2, 3}])  # layer 1 has none left of the first

    memory.take_back(first.sets, goes_on=True)
    assert memory.violations() == []
    assert memory.residents() == ["0.0", "0.1", "1.0", "1.1"]
    now = memory.snapshot(0)
    assert (now.expert_hits, now.expert_misses, now.lent_steps) == (0, 4, 1)

    memory.begin_step()
    memory.take_back(second.sets)
    assert memory.violations() == []
    assert memory.residents() == ["0.0", "0.1", "0.2", "1.2", "1.3"]
    now = memory.snapshot(0)
    assert (now.expert_hits, now.expert_misses, now.lent_steps) == (1, 7, 2)
    assert now.followed_steps == 1
    assert now.experts_evicted == 2


def test_while_steps_go_on_nobody_else_gets_a_frame() -> None:
    """Three for each layer, of which a step leaves two empty: the next one may fill them."""
    memory = Memory()
    start(memory, "r", 16)  # two frames
    memory.begin_step()
    sets = memory.lend(2)
    assert sets is not None
    assert sets.sizes.tolist() == [3, 3]
    before = memory.snapshot(0)
    assert (before.free_frames, before.expert_frames) == (6, 0)
    memory.take_back(run_step(sets, [{0}, {1}]).sets, goes_on=True)
    assert memory.want("0.2") == 0
    now = memory.snapshot(0)
    assert (now.free_frames, now.expert_frames) == (4, 2)
    memory.take_back(run_step(sets, [{0}, {1}]).sets)
    assert memory.want("0.2") == 1


@pytest.mark.parametrize(
    ("wanted", "has"),
    [
        ([("a", 4)], True),  # in its page
        ([("a", 5)], True),  # in the other page of its frame
        ([("a", 9)], False),  # two pages
        ([("b", 9)], True),  # in a's frame, as its own is full
        ([("a", 5), ("b", 9)], False),  # one page is at hand
        ([("a", 4), ("b", 9)], True),
        ([("a", 5), ("b", 4)], True),
        ([("b", 4), ("a", 5), ("b", 9)], False),  # what one has too many is nobody else's
        ([], True),
    ],
)
def test_pages_at_hand_are_those_of_frames_that_hold_kv(
    wanted: list[tuple[str, int]], has: bool
) -> None:
    """b has a frame, and a has a page: the other one of its frame is free."""
    memory = Memory()
    start(memory, "b", 8)
    start(memory, "a", 4)
    frames = memory.snapshot(0).kv_frames
    assert memory.has_pages(wanted) == has
    if has:
        memory.begin_step()
        assert memory.lend(1) is not None
        for rid, num_tokens in wanted:
            assert memory.extend(rid, num_tokens)
        assert memory.snapshot(0).kv_frames == frames
        assert memory.violations() == []
