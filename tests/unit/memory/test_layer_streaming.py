"""Layer streaming: 3 layers of 4 experts, of which a pass over prompts uses 3 or 4 in each."""

from collections.abc import Sequence

import pytest
from prefetched_memory import Memory

from sglmoe.config import MemoryPolicy
from sglmoe.memory.experts import Load

PROMPTS = 257  # tokens


def memory_of(num_frames: int, policy: MemoryPolicy = MemoryPolicy.COST_AWARE) -> Memory:
    memory = Memory(num_frames, policy, num_layers=3)
    memory.set_prices(expert_nanoseconds=1, token_nanoseconds=1)  # the link is quick
    return memory


def on_their_way(memory: Memory) -> list[str]:
    return [f"{load.layer}.{load.expert}" for load in memory.background_loads.under_way]


def test_the_next_layer_comes_while_one_computes_that_uses_most_experts() -> None:
    memory = memory_of(12)
    memory.begin_step(PROMPTS)
    for wave in memory.waves(0, [0, 1, 2]):
        assert wave.tolist() == [0, 1, 2]
        assert memory.demand == ["0.0", "0.1", "0.2"], "its own loads go first"
        assert on_their_way(memory) == ["1.0", "1.1", "1.2", "1.3"]
    for _ in range(4):
        memory.background_loads.arrive()
    assert memory.run(1, 0, 1, 3) == [[0, 1, 3]]
    assert memory.demand == ["0.0", "0.1", "0.2"], "layer 1 has waited for nothing"
    assert memory.counts() == (8, 3, 0, 0)
    assert memory.snapshot(0).experts_streamed == 8
    assert on_their_way(memory) == ["2.0", "2.1", "2.2", "2.3"]


def test_behind_the_last_layer_nothing_is_known() -> None:
    memory = memory_of(12)
    memory.begin_step(PROMPTS)
    memory.run(2, 0, 1, 2, 3)
    assert on_their_way(memory) == []


def test_a_pass_that_uses_fewer_brings_nothing() -> None:
    memory = memory_of(12)
    memory.begin_step(PROMPTS)
    memory.run(0, 0, 1)
    assert on_their_way(memory) == []
    # Five of eight in the two layers so far.
    memory.run(1, 0, 1, 2)
    assert on_their_way(memory) == []
    # The next pass is another one.
    memory.begin_step(PROMPTS)
    memory.run(0, 0, 1, 2)
    assert on_their_way(memory) == ["1.3"]


def test_a_pass_over_few_tokens_brings_nothing() -> None:
    """Steps of large batches use most experts too, but computing leaves the link no time."""
    memory = memory_of(12)
    memory.begin_step(PROMPTS - 1)
    memory.run(0, 0, 1, 2, 3)
    assert on_their_way(memory) == []


def test_no_more_comes_than_the_link_moves_while_a_layer_computes() -> None:
    """Of the first layer nothing is known. It then takes far less than an expert does on this link."""
    memory = memory_of(12)
    memory.set_prices(expert_nanoseconds=10**12, token_nanoseconds=1)
    memory.begin_step(PROMPTS)
    memory.run(0, 0, 1, 2, 3)
    assert on_their_way(memory) == ["1.0", "1.1", "1.2", "1.3"]
    for _ in range(4):
        memory.background_loads.arrive()
    memory.run(1, 0, 1, 2, 3)
    assert on_their_way(memory) == []


def test_layers_that_are_over_give_way_and_the_one_that_computes_does_not() -> None:
    """6 frames: layer 0 leaves 2 for layer 1, which then takes those that layer 0 had."""
    memory = memory_of(6)
    memory.begin_step(PROMPTS)
    memory.run(0, 0, 1, 2, 3)
    assert on_their_way(memory) == ["1.0", "1.1"]
    for _ in range(2):
        memory.background_loads.arrive()
    waves = memory.waves(1, [0, 1, 2, 3])
    assert next(waves).tolist() == [0, 1, 2, 3]
    assert memory.residents() == ["1.0", "1.1", "1.2", "1.3"]
    assert on_their_way(memory) == ["2.0", "2.1"]
    assert list(waves) == []


def test_a_layer_that_needs_every_frame_for_itself_keeps_them() -> None:
    """3 frames for 4 experts: two waves, and a load ahead only in the second, whose frames suffice."""
    memory = memory_of(3)
    memory.begin_step(PROMPTS)
    seen = [(wave.tolist(), on_their_way(memory)) for wave in memory.waves(0, [0, 1, 2, 3])]
    assert [wave for wave, _ in seen] == [[0, 1, 2], [3]]
    assert seen[0][1] == []
    assert memory.demand == ["0.0", "0.1", "0.2", "0.3"]
    assert memory.violations() == []


@pytest.mark.parametrize(
    ("is_paused", "residents"),
    [
        (True, ["0.1", "0.2", "0.3", "1.0", "1.1", "1.2", "1.3", "2.0"]),
        (False, ["1.0", "1.1", "1.2", "1.3", "2.0", "2.3"]),  # and 2.1 and 2.2 on their way
    ],
)
def test_experts_of_layers_ahead_stay_though_they_are_seldom_used(
    is_paused: bool, residents: list[str]
) -> None:
    """8 frames. Steps have used all of layer 0 and, once in eight, 2.3. A pass over layer 1, two
    frames short, takes them from layer 0, which is over: it needs 2.3 in a moment."""
    memory = memory_of(8)
    memory.pause_streaming(True)
    for step in range(8):
        memory.begin_step()
        memory.run(0, 0, 1, 2, 3)
        memory.run(2, 3 if step == 0 else 0)
    memory.begin_step(PROMPTS)
    memory.run(0, 0, 1, 2, 3)
    memory.pause_streaming(is_paused)
    waves = memory.waves(1, [0, 1, 2, 3])
    next(waves)
    assert memory.residents() == residents


@pytest.mark.parametrize("policy", [MemoryPolicy.LRU, MemoryPolicy.LFU, MemoryPolicy.STATIC])
def test_baselines_bring_nothing_ahead(policy: MemoryPolicy) -> None:
    memory = memory_of(12, policy)
    memory.begin_step(PROMPTS)
    memory.run(0, 0, 1, 2, 3)
    assert on_their_way(memory) == []


def test_paused_it_begins_nothing() -> None:
    memory = memory_of(12)
    memory.pause_streaming(True)
    memory.begin_step(PROMPTS)
    memory.run(0, 0, 1, 2, 3)
    assert on_their_way(memory) == []
    memory.pause_streaming(False)
    memory.run(1, 0, 1, 2, 3)
    assert on_their_way(memory) == ["2.0", "2.1", "2.2", "2.3"]
    assert memory.snapshot(0).experts_streamed == 4


class Slow(Memory):
    """Demand loads are under way until the layer asks for their end."""

    def _demand(self, loads: Sequence[Load]) -> "object":  # type: ignore[override]
        super()._demand(loads)
        return lambda: 0.0


def test_it_does_not_wait_for_the_loads_of_the_layer() -> None:
    memory = Slow(12, num_layers=3)
    memory.begin_step(PROMPTS)
    memory.run(0, 0)
    memory.begin_step(PROMPTS)
    waves = memory.waves(0, [0, 1, 2, 3])
    assert next(waves).tolist() == [0]
    assert memory.residents() == ["0.0"]
    assert on_their_way(memory) == ["1.0", "1.1", "1.2", "1.3"]
    waves.close()
