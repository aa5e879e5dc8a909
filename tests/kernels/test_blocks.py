"""SGLang's block ids become frames.

A layer of 4 experts, of which 0 is in frame 7, 2 in frame 5 and 3 in frame 0; blocks of 4 rows.
"""

import torch
from aligned import Aligned, align, routings
from hypothesis import given, settings
from hypothesis import strategies as st

from sglmoe.kernels import blocks, reference


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


TABLE = ints(7, -1, 5, 0)


def test_a_wave_sees_its_own_blocks_only() -> None:
    # Expert 1 is not of this wave: the blocks behind it move up, and each keeps its rows.
    rows = torch.arange(16, dtype=torch.int32)
    rows, frames, padded = blocks.wave_blocks(
        rows, ints(0, 1, 1, 3), ints(16), frame_table=TABLE, block_tokens=4, num_pairs=99
    )
    assert rows.tolist() == [0, 1, 2, 3, 12, 13, 14, 15] + 8 * [99]
    assert frames.tolist() == [7, 0, -1, -1]
    assert padded.tolist() == [8]


def test_what_lies_behind_the_blocks_in_use_is_not_read() -> None:
    # Five of seven; no expert is -1, and expert 1 is absent.
    rows, frames, padded = blocks.wave_blocks(
        torch.arange(28, dtype=torch.int32),
        ints(0, 0, 2, 3, -1, 2, 10**9),
        ints(20),
        frame_table=TABLE,
        block_tokens=4,
        num_pairs=99,
    )
    assert rows.tolist() == [*range(16), *(12 * [99])]
    assert frames.tolist() == [7, 7, 5, 0, -1, -1, -1]
    assert padded.tolist() == [16]


@st.composite
def tables(draw: st.DrawFn, num_experts: int) -> torch.Tensor:
    """Frames of some experts, beyond 16 bits too."""
    return ints(
        *draw(st.lists(st.integers(-1, 2**31 - 1), min_size=num_experts, max_size=num_experts))
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), routed=routings())
def test_any_wave_is_cut_out_as_the_reference_does(data: st.DataObject, routed: Aligned) -> None:
    arguments = {
        "frame_table": data.draw(tables(routed.num_experts)),
        "block_tokens": routed.block_tokens,
        "num_pairs": routed.num_pairs,
    }
    routed_blocks = (routed.sorted_ids, routed.expert_ids, routed.num_padded)
    got = blocks.wave_blocks(*routed_blocks, **arguments)
    for result, expected in zip(
        got, reference.wave_blocks(*routed_blocks, **arguments), strict=True
    ):
        assert torch.equal(result, expected)


def test_alignment_is_sglangs() -> None:
    """The example in the docstring of SGLang's moe_align_block_size."""
    routed = align(torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]]), 4, 5)
    assert routed.sorted_ids[:16].tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert routed.expert_ids[:4].tolist() == [1, 2, 3, 4]
    assert routed.num_padded.tolist() == [16]
