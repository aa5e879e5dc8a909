"""A layer decides on the device who comes in and who gives way, and sorts its pairs into blocks of frames.

One layer of 6 experts with a set of 3 frames: 10, 11 and 12. Expert e has block 20 + e of host memory.
"""

from importlib import import_module
from typing import NamedTuple

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglmoe.kernels import reference
from sglmoe.kernels.dispatch import Dispatched, dispatch
from sglmoe.kernels.residency import DeviceResidency, PageIns

BLOCK_TOKENS = 4


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


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
        self.ids: list[list[int]] = []  # for the host
        self.blocks: list[tuple[int, list[int]]] = []  # frames, and pairs of each

    def step(self, *ids: int, top_k: int = 1, num_rows: int | None = None) -> list[tuple[int, int]]:
        """Dispatch what a step chose; (block, frame) of each page-in."""
        self.state.used_key.add_(1)
        chosen = torch.tensor(ids, dtype=torch.int32).view(-1, top_k)
        written = torch.full_like(chosen, 99)
        dispatched = dispatch(
            chosen,
            0,
            num_rows=ints(len(chosen) if num_rows is None else num_rows),
            state=self.state,
            page_ins=self.out,
            ids=written,
            block_tokens=BLOCK_TOKENS,
        )
        self.ids = written.tolist()
        its = in_use(dispatched, BLOCK_TOKENS)
        pairs = its.pairs.view(-1, BLOCK_TOKENS).tolist()
        self.blocks = list(zip(its.frames.tolist(), pairs, strict=True))
        count = int(self.out.count)
        return list(zip(self.out.sources.tolist(), self.out.frames.tolist(), strict=True))[:count]

    @property
    def table(self) -> list[int]:
        return self.state.frame_table[0].tolist()


def in_use(its: Dispatched, block_tokens: int) -> Dispatched:
    total = int(its.num_padded)
    assert total % block_tokens == 0
    return Dispatched(its.pairs[:total], its.frames[: total // block_tokens], its.num_padded)


# ------------------------------------------------------------------------------------ residents


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


def test_no_expert_and_repeated_ids_need_nothing() -> None:
    bench = Bench()
    assert bench.step(3, -1, 3, 6) == [(23, 10)]
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


# --------------------------------------------------------------------------------------- blocks


def test_pairs_of_an_expert_fill_blocks_of_its_frame_in_order() -> None:
    """Expert 1 is in five rows, which are two blocks; 7 fills them up, as there are seven pairs."""
    bench = Bench()
    bench.step(1, 5, 1, 1, 1, 0, 1)
    assert bench.blocks == [
        (10, [5, 7, 7, 7]),  # expert 0
        (11, [0, 2, 3, 4]),
        (11, [6, 7, 7, 7]),
        (12, [1, 7, 7, 7]),
    ]


def test_an_expert_that_has_just_come_and_one_that_was_there_have_their_frames() -> None:
    bench = Bench()
    bench.step(0, 1, 2)
    bench.step(2, 4)  # takes 0's
    assert bench.blocks == [(12, [0, 2, 2, 2]), (10, [1, 2, 2, 2])]


def test_rows_that_pad_a_step_bring_nobody_in_and_their_pairs_are_in_blocks_of_zeros() -> None:
    """Two rows are real; of the other two one has ids that are none."""
    bench = Bench()
    assert bench.step(1, 2, 2, 0, 4, 5, 9, -7, top_k=2, num_rows=2) == [
        (20, 10),
        (21, 11),
        (22, 12),
    ]
    assert bench.ids == [[1, 2], [2, 0], [-1, -1], [-1, -1]]
    assert bench.blocks == [
        (10, [3, 8, 8, 8]),
        (11, [0, 8, 8, 8]),
        (12, [1, 2, 8, 8]),
        (-1, [4, 5, 6, 7]),
    ]


def test_a_step_of_padding_alone_computes_nothing() -> None:
    bench = Bench()
    assert bench.step(1, 2, 3, 4, 5, 0, top_k=3, num_rows=0) == []
    assert bench.table == [-1] * 6
    assert bench.ids == [[-1] * 3] * 2
    assert bench.blocks == [(-1, [0, 1, 2, 3]), (-1, [4, 5, 6, 6])]


def test_an_expert_that_found_no_frame_has_blocks_of_zeros() -> None:
    bench = Bench()
    bench.step(3, 0, 1, 2)
    assert bench.blocks[2:] == [(12, [3, 4, 4, 4]), (-1, [0, 4, 4, 4])]


def test_ids_may_have_64_bits_and_lie_apart() -> None:
    bench = Bench()
    ids = torch.tensor([[1, 0, 5], [2, 1, 5]])[:, :2]  # top-k of more
    written = torch.zeros(2, 2, dtype=torch.int32)
    dispatched = dispatch(
        ids,
        0,
        num_rows=ints(2),
        state=bench.state,
        page_ins=bench.out,
        ids=written,
        block_tokens=BLOCK_TOKENS,
    )
    assert written.tolist() == [[1, 0], [2, 1]]
    assert in_use(dispatched, BLOCK_TOKENS).pairs.tolist() == [1, 4, 4, 4, 0, 3, 4, 4, 2, 4, 4, 4]


@pytest.mark.parametrize(("num_pairs", "num_experts"), [(7, 8), (8, 8), (9, 8), (640, 512)])
def test_there_is_as_much_room_as_sglang_makes(
    num_pairs: int, num_experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which the GEMM's grid goes."""
    stock = import_module(
        "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size"
    )  # a function has its name
    monkeypatch.setattr(stock, "sgl_moe_align_block_size", lambda *_: None, raising=False)
    ids = torch.zeros(num_pairs, 1, dtype=torch.int32)
    rows, experts, _ = stock.moe_align_block_size(ids, 16, num_experts)
    state = DeviceResidency.empty(1, num_experts, 3, "cpu")
    its = dispatch(
        ids,
        0,
        num_rows=ints(0),
        state=state,
        page_ins=page_ins(3),
        ids=ids.clone(),
        block_tokens=16,
    )
    assert (its.pairs.shape, its.frames.shape) == (rows.shape, experts.shape)


# -------------------------------------------------------------------------------- the reference


class Drawn(NamedTuple):
    """Two layers' state."""

    state: DeviceResidency
    num_experts: int
    max_frames: int


@st.composite
def states(draw: st.DrawFn) -> Drawn:
    """Sets that are empty, too small or large enough; a block that is not there."""
    num_experts, max_frames = draw(st.integers(1, 20)), draw(st.integers(1, 9))
    state = DeviceResidency.empty(2, num_experts, max_frames, "cpu")
    frames = draw(st.permutations(range(2 * max_frames)))
    state.set_frames[:] = torch.tensor(frames, dtype=torch.int32).view(2, -1)
    state.set_sizes[:] = torch.tensor([draw(st.integers(0, max_frames)) for _ in range(2)])
    used = draw(st.lists(st.integers(0, 3), min_size=2 * max_frames, max_size=2 * max_frames))
    state.set_keys[:] = torch.tensor(used, dtype=torch.int32).view(2, -1)
    blocks = draw(st.permutations(range(2 * num_experts)))
    state.block_of[:] = torch.tensor(blocks, dtype=torch.int32).view(2, -1)
    state.block_of[state.block_of == 0] = -1
    return Drawn(state, num_experts, max_frames)


@st.composite
def routings(draw: st.DrawFn, num_experts: int) -> torch.Tensor:
    """One row or many, up to all experts each; rows of -1, and rows that repeat."""
    top_k = draw(st.integers(1, num_experts))
    row = st.one_of(
        st.permutations(range(num_experts)).map(lambda order: order[:top_k]),
        st.lists(st.integers(-1, num_experts), min_size=top_k, max_size=top_k),
    )
    rows = draw(st.lists(row, min_size=1, max_size=draw(st.sampled_from([1, 9]))))
    return torch.tensor(rows * draw(st.integers(1, 3)), dtype=torch.int32)


def laws(state: DeviceResidency, layer: int) -> None:
    """Table and owners are one to one, within the set."""
    size = int(state.set_sizes[layer])
    owners = state.set_owners[layer, :size].tolist()
    frames = state.set_frames[layer, :size].tolist()
    held = {owner: frame for owner, frame in zip(owners, frames, strict=True) if owner >= 0}
    table = enumerate(state.frame_table[layer].tolist())
    assert held == {expert: frame for expert, frame in table if frame >= 0}


def check_step(
    drawn: Drawn, expected: DeviceResidency, layer: int, ids: torch.Tensor, num_rows: int, rows: int
) -> None:
    """The layer goes on from `drawn` as the reference does from `expected`, with blocks of `rows`."""
    state = drawn.state
    outs = [page_ins(drawn.max_frames) for _ in range(2)]
    written = [torch.full_like(ids, 99) for _ in range(2)]
    found = [
        its(
            ids,
            layer,
            num_rows=ints(num_rows),
            state=a_state,
            page_ins=out,
            ids=host_ids,
            block_tokens=rows,
        )
        for its, a_state, out, host_ids in zip(
            (dispatch, reference.dispatch), (state, expected), outs, written, strict=True
        )
    ]
    for name, its in msgspec.structs.asdict(state).items():
        assert torch.equal(its, getattr(expected, name)), name
    out, expected_out = outs
    assert torch.equal(out.count, expected_out.count)
    count = int(out.count)
    assert torch.equal(out.sources[:count], expected_out.sources[:count])
    assert torch.equal(out.frames[:count], expected_out.frames[:count])
    assert torch.equal(*written)
    got = in_use(found[0], rows)
    for name in ("num_padded", "pairs", "frames"):
        assert torch.equal(getattr(got, name), getattr(found[1], name)), name
    assert sorted(set(got.pairs.tolist()) - {ids.numel()}) == list(range(ids.numel()))
    laws(state, layer)
    if not state.shortfall:
        is_real = (written[0] >= 0) & (written[0] < drawn.num_experts)
        assert (state.frame_table[layer, written[0][is_real]] >= 0).all()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_steps_are_dispatched_as_the_reference_does(data: st.DataObject) -> None:
    """Two layers in turn."""
    drawn = data.draw(states())
    expected = copy_of(drawn.state)
    block_tokens = data.draw(st.sampled_from([1, 4, 16]))
    for _ in range(data.draw(st.integers(1, 4))):
        for its in (drawn.state, expected):
            its.used_key.add_(1)
        for layer in range(2):
            ids = data.draw(routings(drawn.num_experts))
            num_rows = data.draw(st.integers(0, len(ids)))
            check_step(drawn, expected, layer, ids, num_rows, block_tokens)


@pytest.mark.parametrize(("num_rows", "num_real"), [(1, 1), (64, 64), (64, 33)])
@pytest.mark.parametrize(("num_experts", "top_k"), [(128, 8), (512, 10)])
def test_the_sizes_of_large_models(
    num_rows: int, num_real: int, num_experts: int, top_k: int
) -> None:
    """More pairs than are compared, or written, at once."""
    random = torch.Generator().manual_seed(num_rows)
    state = DeviceResidency.empty(1, num_experts, num_experts, "cpu")
    state.set_frames[0] = torch.randperm(num_experts, generator=random)
    state.set_sizes[0] = num_experts - 1
    state.block_of[0] = torch.randperm(num_experts, generator=random)
    scores = torch.rand(num_rows, num_experts, generator=random)
    ids = scores.topk(top_k).indices.to(torch.int32)
    drawn = Drawn(state, num_experts, num_experts)
    check_step(drawn, copy_of(state), 0, ids, num_real, 16)
