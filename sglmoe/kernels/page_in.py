"""Brings experts from page-locked host memory into frames, with every index on the device.

The device reads host memory over the link itself, so which experts come and how many is known only there: nothing waits for the
host, and a captured graph moves what each replay has decided.
"""

import torch
import triton
import triton.language as tl

VECTOR_BYTES = 16  # what one thread moves at a time
# SGLang 0.5.23 measured for its own page-in kernel that 256 programs of 256 threads serve decode best (paged_experts.cuh).
NUM_PROGRAMS = 256
NUM_WARPS = 8
CHUNK_WORDS = 2048  # arbitrary: two vectors a thread


@triton.jit(do_not_specialize=["expert_vectors", "frame_vectors"])
def page_in_kernel(
    blocks: tl.tensor,
    arena: tl.tensor,
    sources: tl.tensor,
    frames: tl.tensor,
    count: tl.tensor,
    expert_vectors: tl.tensor,
    frame_vectors: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """Programs share the chunks of all loads evenly. Words are int32, a vector is four; offsets have 64 bits."""
    expert_words = expert_vectors.to(tl.int64) * 4
    frame_words = frame_vectors.to(tl.int64) * 4
    num_chunks = tl.cdiv(expert_words, CHUNK)
    total = tl.load(count).to(tl.int64) * num_chunks
    for chunk in range(tl.program_id(0).to(tl.int64), total, tl.num_programs(0)):
        load = chunk // num_chunks
        word = (chunk % num_chunks) * CHUNK + tl.arange(0, CHUNK)
        source = tl.load(sources + load).to(tl.int64) * expert_words
        target = tl.load(frames + load).to(tl.int64) * frame_words
        is_word = word < expert_words
        tl.store(arena + target + word, tl.load(blocks + source + word, mask=is_word), mask=is_word)


def page_in(
    blocks: torch.Tensor,
    arena: torch.Tensor,
    *,
    frame_bytes: int,
    sources: torch.Tensor,
    frames: torch.Tensor,
    count: torch.Tensor,
    num_programs: int = NUM_PROGRAMS,
) -> None:
    """Copy block `sources[i]` to the start of frame `frames[i]`, for i < `count[0]`; in any order, and no frame twice.

    `blocks`: uint8 `[num_blocks, expert_bytes]`, page-locked, with `expert_bytes` a multiple of 16, and unchanged until the
    copy is done; `arena`: uint8 `[num_frames * frame_bytes]`; `sources`, `frames`: int32 `[n]`; `count`: int32 `[1]`. May be
    captured.
    """
    expert_bytes = blocks.shape[1]
    assert expert_bytes % VECTOR_BYTES == 0
    assert frame_bytes % VECTOR_BYTES == 0
    assert blocks.is_contiguous()
    page_in_kernel[(num_programs,)](
        blocks.view(torch.int32),
        arena.view(torch.int32),
        sources,
        frames,
        count,
        expert_bytes // VECTOR_BYTES,
        frame_bytes // VECTOR_BYTES,
        CHUNK=CHUNK_WORDS,
        num_warps=NUM_WARPS,
    )
