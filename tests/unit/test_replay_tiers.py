"""Host memory on a trace's misses: policies whose outcome can be counted by hand."""

from test_replay import trace_of

from eval.replay_tiers import TierOutcome, first_that_fit, lru, oracle, replay_host
from sglmoe.config import MemoryPolicy

# One layer: 0 1 2 0 1 2 0 1 2, a frame for one of them.
CIRCLE = [(0, expert) for expert in (0, 1, 2) * 3]


def test_baselines_counted_by_hand() -> None:
    assert first_that_fit(CIRCLE, 2, 4) == TierOutcome("first that fit", 6 / 9, 0.0)
    # What is needed next was dropped just before.
    assert lru(CIRCLE, 2) == TierOutcome("LRU", 0.0, 1.0)
    assert lru(CIRCLE, 3).hit_ratio == 6 / 9
    # It begins empty, then 0 and 1 stay: 2 is always needed last of the three.
    assert oracle(CIRCLE, 2).hit_ratio == 4 / 9


def test_experts_in_a_circle_do_not_chase_each_other_out_of_host_memory() -> None:
    """8 rounds of 0 1 2 through one frame. Blocks hold 0 and 1 from the start, and keep them."""
    trace = trace_of([[[expert]] for expert in (0, 1, 2) * 8])
    ours, misses = replay_host(trace, num_frames=2, num_blocks=2, policy=MemoryPolicy.LRU)
    assert len(misses) == 24
    assert ours.hit_ratio == 16 / 24
    assert ours.reads_per_miss == 0


def test_an_expert_that_was_missed_and_left_its_frame_takes_the_block_of_an_unused_one() -> None:
    """4 rounds of 1 2 3 through two frames. Blocks hold 0 and 1; 2 takes 0's when 1 comes again."""
    trace = trace_of([[[expert]] for expert in (1, 2, 3) * 4])
    ours, misses = replay_host(trace, num_frames=2, num_blocks=2, policy=MemoryPolicy.LRU)
    assert len(misses) == 12
    # 1 hits each time, 2 three times. 3 was missed no more often than they, so it does not come.
    assert ours == TierOutcome("sglmoe", 7 / 12, 1 / 12)
