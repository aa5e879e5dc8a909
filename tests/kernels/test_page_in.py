"""Experts from blocks of host memory into frames; which and how many is data."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vast import vast_bytes

from sglmoe.kernels import reference
from sglmoe.kernels.page_in import page_in


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_the_first_count_experts_arrive_and_nothing_else_changes() -> None:
    # Three blocks of 16 bytes, four frames of 32; block 1 goes to frame 3 and block 0 to frame 0.
    blocks = torch.arange(48, dtype=torch.uint8).view(3, 16)
    arena = torch.full((4 * 32,), 255, dtype=torch.uint8)
    page_in(
        blocks, arena, frame_bytes=32, sources=ints(1, 0, 2), frames=ints(3, 0, 1), count=ints(2)
    )
    frames = arena.view(4, 32)
    assert frames[3, :16].tolist() == list(range(16, 32))
    assert frames[0, :16].tolist() == list(range(16))
    assert frames[1].eq(255).all()  # the third is behind `count`
    assert frames[:, 16:].eq(255).all()  # what a frame has behind its expert


def test_no_loads_move_nothing() -> None:
    arena = torch.full((64,), 255, dtype=torch.uint8)
    page_in(
        torch.zeros(1, 16, dtype=torch.uint8),
        arena,
        frame_bytes=32,
        sources=ints(0),
        frames=ints(0),
        count=ints(0),
    )
    assert arena.eq(255).all()


def test_offsets_have_64_bits() -> None:
    """A frame beyond 2^31 words of the arena, a block beyond 2^31 words of host memory."""
    num_bytes = 2**33 + 2**20
    arena, blocks = vast_bytes(num_bytes), vast_bytes(num_bytes).view(-1, 4096)
    last_frame, last_block = num_bytes // 8192 - 1, len(blocks) - 1
    blocks[last_block] = torch.arange(4096, dtype=torch.int32).to(torch.uint8)
    page_in(
        blocks,
        arena,
        frame_bytes=8192,
        sources=ints(last_block),
        frames=ints(last_frame),
        count=ints(1),
        num_programs=2,
    )
    assert torch.equal(arena[last_frame * 8192 :][:4096], blocks[last_block])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_loads_move_as_the_reference_does(data: st.DataObject) -> None:
    num_blocks, num_frames = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    # Up to three chunks of a program, the last of them in part.
    expert_bytes = 16 * data.draw(st.sampled_from([1, 3, 511, 512, 513, 1100]))
    frame_bytes = expert_bytes + 16 * data.draw(st.integers(0, 3))
    frames = data.draw(st.permutations(range(num_frames)))
    sources = data.draw(
        st.lists(st.integers(0, num_blocks - 1), min_size=num_frames, max_size=num_frames)
    )
    blocks = torch.randint(0, 256, (num_blocks, expert_bytes), dtype=torch.uint8)
    arenas = [torch.full((num_frames * frame_bytes,), 255, dtype=torch.uint8) for _ in range(2)]
    arguments = {
        "frame_bytes": frame_bytes,
        "sources": ints(*sources),
        "frames": ints(*frames),
        "count": ints(data.draw(st.integers(0, num_frames))),
    }
    page_in(blocks, arenas[0], **arguments, num_programs=data.draw(st.sampled_from([1, 3, 64])))
    reference.page_in(blocks, arenas[1], **arguments)
    assert torch.equal(*arenas)
