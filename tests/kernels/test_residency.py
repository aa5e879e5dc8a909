"""A layer decides on the device who comes in and who gives way.

One layer of 6 experts with a set of 3 frames: 10, 11 and 12. Expert e has block 20 + e of host memory.
"""

import msgspec
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglmoe.kernels import reference
from sglmoe.kernels.residency import DeviceResidency, PageIns, decide


def page_ins(num_frames: int) -> PageIns:
    return PageIns(*(torch.zeros(n, dtype=torch.int32) for n in (num_frames, num_frames, 1)))


def copy_of(state: DeviceResidency) -> DeviceResidency:
    return DeviceResidency(
        **{name: its.clone() for name, its in msgspec.structs.asdict(state).items()}
    )


class Bench:
    def __init__(self) -> None:
        self.state = DeviceResidency.empty(1, 6, 3, "cpu")
        self.state.set_frames[0] = torch.tensor([10, 11, 12])
        self.state.set_sizes[0] = 3
        self.state.block_of[0] = torch.arange(20, 26)
        self.out = page_ins(3)

    def step(self, *ids: int) -> list[tuple[int, int]]:
        """Decide for a step; (block, frame) of each page-in."""
        self.state.used_key.add_(1)
        decide(torch.tensor(ids, dtype=torch.int32), 0, state=self.state, page_ins=self.out)
        count = int(self.out.count)
        return list(zip(self.out.sources.tolist(), self.out.frames.tolist(), strict=True))[:count]

    @property
    def table(self) -> list[int]:
        return self.state.frame_table[0].tolist()


def test_misses_take_empty_frames_first_in_the_order_of_their_ids() -> None:
    bench = Bench()
    assert bench.step(4, 1) == [(21, 10), (24, 11)]
    assert bench.table == [-1, 10, -1, -1, 11, -1]
    assert bench.step(1, 4) == []


def test_the_least_recently_used_gives_way_and_never_one_that_is_needed() -> None:
    bench = Bench()
    bench.step(0, 1, 2)
    bench.step(0)
    # Expert 1 and 2 were last used in step 1, in frames 11 and 12; 1 is needed now.
    assert bench.step(1, 5) == [(25, 12)]
    assert bench.table == [10, 11, -1, -1, -1, 12]
    assert bench.state.set_owners.tolist() == [[0, 1, 5]]
    assert bench.state.set_keys.tolist() == [[2, 3, 3]]


def test_an_empty_frame_goes_before_any_expert() -> None:
    bench = Bench()
    bench.step(0, 1)
    bench.state.set_keys[0, 2] = 9  # a prefetch came there in vain, lately
    assert bench.step(4) == [(24, 12)]


def test_padding_and_repeated_ids_need_nothing() -> None:
    bench = Bench()
    assert bench.step(3, -1, 3, -1) == [(23, 10)]
    assert bench.step(-1) == []
    assert int(bench.state.shortfall) == 0


def test_a_set_that_is_too_small_is_told() -> None:
    bench = Bench()
    assert bench.step(0, 1, 2, 3, 4) == [(20, 10), (21, 11), (22, 12)]
    assert int(bench.state.shortfall) == 2
    assert bench.step(0, 1, 2, 3) == []  # all three are needed themselves
    bench.state.shortfall.fill_(2)
    assert bench.step(3, 4) == [(23, 10), (24, 11)]
    assert int(bench.state.shortfall) == 2  # a total, until the host sets it to 0


def test_an_expert_that_host_memory_has_not_got_is_told_and_takes_no_frame() -> None:
    bench = Bench()
    bench.state.block_of[0, 2] = -1
    assert bench.step(1, 2, 3) == [(21, 10), (23, 11)]
    assert bench.table[2] == -1
    assert int(bench.state.shortfall) == 1


def test_frames_beyond_the_set_are_not_touched() -> None:
    bench = Bench()
    bench.state.set_sizes[0] = 2
    assert bench.step(0, 1, 2) == [(20, 10), (21, 11)]
    assert bench.state.set_owners.tolist() == [[0, 1, -1]]


def laws(state: DeviceResidency, layer: int) -> None:
    """Table and owners are one to one, within the set."""
    size = int(state.set_sizes[layer])
    owners = state.set_owners[layer, :size].tolist()
    frames = state.set_frames[layer, :size].tolist()
    held = {owner: frame for owner, frame in zip(owners, frames, strict=True) if owner >= 0}
    table = enumerate(state.frame_table[layer].tolist())
    assert held == {expert: frame for expert, frame in table if frame >= 0}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_steps_are_decided_as_the_reference_does(data: st.DataObject) -> None:
    """Two layers in turn; ids of one token or many, up to all experts each, with padding; sets that are empty or too small."""
    num_experts, max_frames = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 9))
    state = DeviceResidency.empty(2, num_experts, max_frames, "cpu")
    frames = data.draw(st.permutations(range(2 * max_frames)))
    state.set_frames[:] = torch.tensor(frames, dtype=torch.int32).view(2, -1)
    state.set_sizes[:] = torch.tensor([data.draw(st.integers(0, max_frames)) for _ in range(2)])
    used = data.draw(st.lists(st.integers(0, 3), min_size=2 * max_frames, max_size=2 * max_frames))
    state.set_keys[:] = torch.tensor(used, dtype=torch.int32).view(2, -1)
    blocks = data.draw(st.permutations(range(2 * num_experts)))
    state.block_of[:] = torch.tensor(blocks, dtype=torch.int32).view(2, -1)
    state.block_of[state.block_of == 0] = -1  # one is not there
    expected, out, expected_out = copy_of(state), page_ins(max_frames), page_ins(max_frames)
    for _ in range(data.draw(st.integers(1, 4))):
        for its in (state, expected):
            its.used_key.add_(1)
        for layer in range(2):
            ids = data.draw(st.lists(st.integers(-1, num_experts - 1), min_size=1, max_size=40))
            routed = torch.tensor(ids, dtype=torch.int32)
            decide(routed, layer, state=state, page_ins=out)
            reference.decide(routed, layer, state=expected, page_ins=expected_out)
            for name, its in msgspec.structs.asdict(state).items():
                assert torch.equal(its, getattr(expected, name)), name
            assert torch.equal(out.count, expected_out.count)
            count = int(out.count)
            assert torch.equal(out.sources[:count], expected_out.sources[:count])
            assert torch.equal(out.frames[:count], expected_out.frames[:count])
            laws(state, layer)
            if not state.shortfall:
                assert all(state.frame_table[layer, e] >= 0 for e in ids if e >= 0)
