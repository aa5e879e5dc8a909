"""Grouped GEMM out of frames: SGLang's own kernel, told frames where it expects experts.

SGLang sorts (token, expert) pairs by expert, fills each expert's run up with padding to whole blocks of `block_tokens` rows,
and hands its GEMM one expert id a block. The GEMM takes that expert's matrix at `id * stride(0)`, in 64 bits, so ids of
frames and a view of the arena whose stride is a frame make it read frames: the same compiled code, the same sums, the same
bits.

What is here translates the ids on the device. T tokens, k experts a token, B blocks, E experts.
"""

import torch
import triton
import triton.language as tl

ABSENT = -1  # a block that SGLang's GEMM fills with zeros


@triton.jit(do_not_specialize=["num_experts"])
def wave_blocks_kernel(
    sorted_ids: tl.tensor,
    expert_ids: tl.tensor,
    num_padded: tl.tensor,
    frame_table: tl.tensor,
    wave_sorted: tl.tensor,
    wave_frames: tl.tensor,
    wave_padded: tl.tensor,
    num_experts: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program a block: moves it behind the blocks of the wave that lie in front of it."""
    block = tl.program_id(0)
    num_used = tl.load(num_padded) // BLOCK_TOKENS
    place = 0
    for start in range(0, block, CHUNK):
        other = start + tl.arange(0, CHUNK)
        expert = tl.load(expert_ids + other, mask=(other < block) & (other < num_used), other=-1)
        is_expert = (expert >= 0) & (expert < num_experts)
        frame = tl.load(frame_table + expert, mask=is_expert, other=-1)
        place += tl.sum((frame >= 0).to(tl.int32), axis=0)
    expert = tl.load(expert_ids + block, mask=block < num_used, other=-1)
    is_expert = (expert >= 0) & (expert < num_experts)
    frame = tl.load(frame_table + expert, mask=is_expert, other=-1)
    is_mine = frame >= 0
    row = tl.arange(0, BLOCK_TOKENS)
    ids = tl.load(sorted_ids + block * BLOCK_TOKENS + row, mask=is_mine, other=0)
    tl.store(wave_sorted + place * BLOCK_TOKENS + row, ids, mask=is_mine)
    tl.store(wave_frames + place, frame, mask=is_mine)
    num_in_wave = place + is_mine.to(tl.int32)
    tl.store(wave_padded, num_in_wave * BLOCK_TOKENS, mask=block == tl.num_programs(0) - 1)


def wave_blocks(
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_padded: torch.Tensor,
    *,
    frame_table: torch.Tensor,
    block_tokens: int,
    num_pairs: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Only the blocks whose expert is in `frame_table`, in their order: what SGLang's GEMM needs to compute one wave.

    It would overwrite other waves' rows with zeros if it saw their blocks, so they are taken out.
    `sorted_ids`: int32 `[P]`, P >= B * block_tokens - block_tokens + 1; `expert_ids`: int32 `[B]`, of which the first
    `num_padded / block_tokens` are in use and the rest means nothing, as does a negative one; `num_padded`: int32 `[1]`;
    `frame_table`: int32 `[E]`, one layer's; `num_pairs` is `T * k`, the id of padding rows. Returns sorted ids `[P]`,
    frames `[B]` and the number of rows in use `[1]`, int32; behind those, padding and ABSENT. No host synchronisation.
    """
    num_blocks = len(expert_ids)
    rows = torch.full(
        (num_blocks * block_tokens,), num_pairs, dtype=torch.int32, device=sorted_ids.device
    )
    frames = torch.full_like(expert_ids, ABSENT)
    padded = torch.zeros_like(num_padded)
    wave_blocks_kernel[(num_blocks,)](
        sorted_ids,
        expert_ids,
        num_padded,
        frame_table,
        rows,
        frames,
        padded,
        len(frame_table),
        BLOCK_TOKENS=block_tokens,
        CHUNK=256,  # arbitrary
    )
    return rows[: len(sorted_ids)], frames, padded
