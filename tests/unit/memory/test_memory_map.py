"""The drawing of memory: 8 frames of one expert or two pages of 4 tokens; 2 layers of 4 experts."""

from array import array

import numpy as np
import pytest
from test_prefetches import Memory

from sglmoe.config import MemoryPolicy
from sglmoe.memory.memory_map import heat_levels, ranks

NOBODY = np.zeros((2, 4), np.bool_)


def tokens(first: int, num_tokens: int) -> bytes:
    return array("i", range(first, first + num_tokens)).tobytes()


def test_a_frame_has_the_letter_of_what_it_holds() -> None:
    memory = Memory()
    assert memory.draw(NOBODY).frames == "........"
    memory.admit("a", tokens(0, 12), "")
    memory.extend("a", 12)  # three pages: two frames, the first ones
    memory.run(0, 1, 2)
    assert memory.draw(NOBODY).frames == "kkee...."
    memory.begin_step()
    memory.want("1.3")
    assert memory.draw(NOBODY).frames == "kkeel..."
    memory.release("a", tokens(0, 12), 8)  # two full pages stay cached, in the first frame
    assert memory.draw(NOBODY).frames == "c.eel..."


def test_kv_of_a_running_request_makes_a_shared_frame_its_own() -> None:
    memory = Memory()
    memory.admit("a", tokens(0, 4), "")
    memory.extend("a", 4)
    memory.release("a", tokens(0, 4), 4)
    memory.admit("b", tokens(100, 4), "")
    memory.extend("b", 4)
    assert memory.draw(NOBODY).frames == "k......."


def test_an_expert_has_the_letter_of_where_it_is() -> None:
    """In the checkpoint, in host memory, in a frame, on its way, arrived before anything used it."""
    memory = Memory()
    in_host = NOBODY.copy()
    in_host[1] = True
    memory.run(0, 1)
    memory.begin_step()
    memory.want("1.0", "1.1")
    assert memory.draw(in_host).residency == (".r..", "llhh")
    memory.background_loads.arrive()
    memory.run(0, 1)  # what has arrived is taken in when a layer begins
    assert memory.draw(in_host).residency == (".r..", "alhh")
    memory.run(1, 0)
    assert memory.draw(in_host).residency[1][0] == "r"


def test_heat_is_the_share_of_steps_where_the_policy_knows_it() -> None:
    memory = Memory()
    for step in range(4):
        memory.begin_step()
        memory.run(0, 0, *([1] if step == 0 else []))
    memory.begin_step()
    drawn = memory.draw(NOBODY)
    always, once, never = (int(drawn.heat[0][expert], 36) for expert in range(3))
    assert drawn.heat_is == "share"
    assert 30 < always <= 35
    assert 10 < once < 25
    assert never < once


@pytest.mark.parametrize("policy", [MemoryPolicy.LRU, MemoryPolicy.LFU])
def test_heat_is_a_rank_where_it_does_not(policy: MemoryPolicy) -> None:
    memory = Memory(policy=policy)
    memory.run(0, 2)
    memory.run(0, 2)
    memory.run(0, 3)
    drawn = memory.draw(NOBODY)
    assert drawn.heat_is == "rank"
    # Six of eight were never used: nobody is less in demand. LRU has 3 before 2, LFU 2 before 3.
    hottest, second = (3, 2) if policy is MemoryPolicy.LRU else (2, 3)
    assert drawn.heat[0][0] == drawn.heat[1][3] == "0"
    assert drawn.heat[0][second] == "u"  # sqrt(6 / 8) of 35 is 30.3
    assert drawn.heat[0][hottest] == "x"  # sqrt(7 / 8) of 35 is 32.7


def test_levels_spread_small_shares() -> None:
    shares = np.array([[0.0, (1 / 35) ** 2, 0.25, 1.0]])
    assert heat_levels(shares).tolist() == [[0, 1, 18, 35]]
    assert ranks(np.array([[5.0, 1.0], [1.0, 7.0]])).tolist() == [[0.5, 0.0], [0.0, 0.75]]
    assert ranks(np.zeros((0, 0))).shape == (0, 0)
