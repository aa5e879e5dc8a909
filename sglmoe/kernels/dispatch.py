"""A captured layer's routing, made ready for SGLang's grouped GEMM by one program: which experts come in and whom they replace,
and each token's experts sorted into blocks with the frame to read.

It stands for SGLang's `moe_align_block_size` and what paging adds to it: in a graph every launch costs, however little it does.
T rows, k experts a row, P = T * k pairs (token, expert), E experts, F frames of the largest set.
"""

import msgspec
import torch
import triton
import triton.language as tl

from sglmoe.kernels.residency import DeviceResidency, PageIns

MOST_COMPARED = (
    8192  # arbitrary: ids times experts at once; 64 elements for each thread of four warps
)
PAIRS_AT_A_TIME = 256  # arbitrary: written at once


class Dispatched(msgspec.Struct, frozen=True, eq=False):
    """What SGLang's GEMM takes, int32: B blocks of `block_tokens` pairs of one frame. What is not in use means nothing."""

    pairs: torch.Tensor  # [B * block_tokens], by frame; P fills a block up
    frames: torch.Tensor  # [B], ABSENT: the GEMM writes zeros
    num_padded: torch.Tensor  # [1], pairs in use, with what fills blocks up


def num_warps(num_experts: int) -> int:
    """Eight for many experts, or threads would run out of registers."""
    return 4 if num_experts <= 256 else 8


def ids_at_a_time(num_pairs: int, experts: int) -> int:
    """Compared with all experts and with each other. `experts` is a power of two."""
    return min(int(triton.next_power_of_2(num_pairs)), max(16, MOST_COMPARED // experts), 64)


@triton.jit
def how_many(mask: tl.tensor) -> tl.tensor:
    """Of them that are true."""
    return tl.sum(mask.to(tl.int32), axis=0)


@triton.jit
def order(
    place: tl.tensor, owner: tl.tensor, key: tl.tensor, is_free: tl.tensor, FRAMES: tl.constexpr
) -> tl.tensor:
    """The lower, the sooner a place changes hands: empty ones first, then by key; of equals the first."""
    rank = tl.where(owner < 0, 0, key + 1).to(tl.int64)
    return tl.where(is_free, rank * FRAMES + place, 2**62)


@triton.jit
def count_pairs(
    topk_ids: tl.tensor,
    ids: tl.tensor,
    ranks: tl.tensor,
    num_real: tl.tensor,
    num_pairs: tl.tensor,
    num_experts: tl.tensor,
    EXPERTS: tl.constexpr,
    IDS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Pairs of each expert, and pairs of none. Writes the ids of the `num_real` first pairs, -1 for others, and of each pair
    how many lie in front of it that have the same."""
    expert, lane = tl.arange(0, EXPERTS), tl.arange(0, IDS)
    counts = expert * 0
    num_none = num_pairs * 0
    for start in range(0, num_pairs, IDS):
        pair = start + lane
        is_pair = pair < num_pairs
        chosen = tl.load(topk_ids + pair, mask=pair < num_real, other=-1).to(tl.int32)
        tl.store(ids + pair, chosen, mask=is_pair)
        is_routed = (chosen >= 0) & (chosen < num_experts)
        chosen = tl.where(is_routed, chosen, -1)
        is_before = (chosen[:, None] == chosen[None, :]) & (lane[None, :] < lane[:, None])
        rank = tl.sum(is_before.to(tl.int32), axis=1)
        rank += tl.where(is_routed, tl.gather(counts, tl.maximum(chosen, 0), 0), num_none)
        tl.store(ranks + pair, rank, mask=is_pair)
        is_its = expert[:, None] == chosen[None, :]
        counts += tl.sum(is_its.to(tl.int32), axis=1)
        num_none += how_many(is_pair & ~is_routed)
    return counts, num_none


@triton.jit
def fill_blocks(
    ids: tl.tensor,
    ranks: tl.tensor,
    pairs: tl.tensor,
    block_frames: tl.tensor,
    num_padded: tl.tensor,
    counts: tl.tensor,
    num_none: tl.tensor,
    frame: tl.tensor,
    num_pairs: tl.tensor,
    num_experts: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    """Blocks of experts in the order of their ids, then those of no expert. Within an expert pairs stay in order."""
    lane = tl.arange(0, PAIRS)
    num_blocks = (counts + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    first = tl.cumsum(num_blocks, 0) - num_blocks
    for index in range(tl.max(num_blocks, axis=0)):
        tl.store(block_frames + first + index, frame, mask=index < num_blocks)
    num_used = tl.sum(num_blocks, axis=0)
    num_all = num_used + (num_none + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    for start in range(num_used, num_all, PAIRS):
        tl.store(block_frames + start + lane, -1, mask=start + lane < num_all)
    total = num_all * BLOCK_TOKENS
    tl.store(num_padded, total)
    for start in range(0, total, PAIRS):
        tl.store(pairs + start + lane, num_pairs, mask=start + lane < total)
    tl.debug_barrier()  # pairs come behind what fills blocks up; ids and ranks were written by other threads
    for start in range(0, num_pairs, PAIRS):
        pair = start + lane
        is_pair = pair < num_pairs
        its = tl.load(ids + pair, mask=is_pair, other=-1)
        is_routed = (its >= 0) & (its < num_experts)
        block = tl.gather(first, tl.where(is_routed, its, 0), 0)
        place = tl.where(is_routed, block, num_used) * BLOCK_TOKENS
        place += tl.load(ranks + pair, mask=is_pair, other=0)
        tl.store(pairs + place, pair, mask=is_pair)


@triton.jit
def bring_in(
    counts: tl.tensor,
    its_frame: tl.tensor,
    has_block: tl.tensor,
    owner: tl.tensor,
    key: tl.tensor,
    is_place: tl.tensor,
    used: tl.tensor,
    frame_table: tl.tensor,
    block_of: tl.tensor,
    set_frames: tl.tensor,
    set_owners: tl.tensor,
    set_keys: tl.tensor,
    shortfall: tl.tensor,
    sources: tl.tensor,
    frames: tl.tensor,
    count: tl.tensor,
    EXPERTS: tl.constexpr,
    FRAMES: tl.constexpr,
) -> tl.tensor:
    """Missing experts are served in the order of their ids, each by the free place that is first. The frame of each expert
    afterwards, if it is needed."""
    expert, place = tl.arange(0, EXPERTS), tl.arange(0, FRAMES)
    is_kept = (owner >= 0) & (tl.gather(counts, tl.maximum(owner, 0), 0) > 0)
    key = tl.where(is_kept, used, key)
    is_missing, is_free = (counts > 0) & (its_frame < 0), is_place & ~is_kept
    is_served = is_missing & has_block
    num_served = tl.minimum(how_many(is_served), how_many(is_free))
    next_expert = tl.where(is_served, expert, EXPERTS)
    rank = order(place, owner, key, is_free, FRAMES)
    tl.debug_barrier()  # the loads of all warps come before the first store to what they read
    for index in range(num_served):
        newcomer = tl.min(next_expert, axis=0)
        victim = (tl.min(rank, axis=0) % FRAMES).to(tl.int32)
        frame = tl.load(set_frames + victim)
        evicted = tl.load(set_owners + victim)
        tl.store(frame_table + evicted, -1, mask=evicted >= 0)
        tl.store(frame_table + newcomer, frame)
        tl.store(set_owners + victim, newcomer)
        tl.store(sources + index, tl.load(block_of + newcomer))
        tl.store(frames + index, frame)
        its_frame = tl.where(expert == newcomer, frame, its_frame)
        next_expert = tl.where(expert == newcomer, EXPERTS, next_expert)
        rank = tl.where(place == victim, 2**62, rank)
        key = tl.where(place == victim, used, key)
    tl.store(set_keys + place, key, mask=is_place)
    tl.store(count, num_served)
    tl.store(shortfall, tl.load(shortfall) + how_many(is_missing) - num_served)
    return its_frame


# What belongs together stays in a line.
# fmt: off
@triton.jit(do_not_specialize=["layer", "num_pairs", "top_k", "num_experts", "max_frames"])
def dispatch_kernel(
    topk_ids: tl.tensor, num_rows: tl.tensor,
    frame_table: tl.tensor, block_of: tl.tensor, set_frames: tl.tensor, set_owners: tl.tensor,
    set_keys: tl.tensor, set_sizes: tl.tensor, used_key: tl.tensor, shortfall: tl.tensor,
    sources: tl.tensor, frames: tl.tensor, count: tl.tensor,
    ids: tl.tensor, ranks: tl.tensor,
    pairs: tl.tensor, block_frames: tl.tensor, num_padded: tl.tensor,
    layer: tl.tensor, num_pairs: tl.tensor, top_k: tl.tensor, num_experts: tl.tensor,
    max_frames: tl.tensor,
    EXPERTS: tl.constexpr, FRAMES: tl.constexpr, IDS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    """One program: arguments of `dispatch`, and what it returns; `ranks` is room for it to write in."""
    frame_table += layer * num_experts
    block_of += layer * num_experts
    set_frames += layer * max_frames
    set_owners += layer * max_frames
    set_keys += layer * max_frames
    expert, place = tl.arange(0, EXPERTS), tl.arange(0, FRAMES)
    is_expert, is_place = expert < num_experts, place < tl.load(set_sizes + layer)
    # All loads begin before anything waits for one.
    its_frame = tl.load(frame_table + expert, mask=is_expert, other=-1)
    has_block = tl.load(block_of + expert, mask=is_expert, other=-1) >= 0
    owner = tl.load(set_owners + place, mask=is_place, other=-1)
    key = tl.load(set_keys + place, mask=is_place, other=0)
    used, num_real = tl.load(used_key), tl.load(num_rows) * top_k
    counts, num_none = count_pairs(
        topk_ids, ids, ranks, num_real, num_pairs, num_experts, EXPERTS, IDS
    )
    its_frame = bring_in(
        counts, its_frame, has_block, owner, key, is_place, used,
        frame_table, block_of, set_frames, set_owners, set_keys, shortfall, sources, frames, count,
        EXPERTS, FRAMES,
    )
    fill_blocks(
        ids, ranks, pairs, block_frames, num_padded, counts, num_none, its_frame, num_pairs,
        num_experts, BLOCK_TOKENS, PAIRS,
    )
# fmt: on


def room_for(num_pairs: int, *, num_experts: int, block_tokens: int) -> int:
    """Pairs in blocks at most, as SGLang's `moe_align_block_size` has it: its grids go by that."""
    room = num_pairs * block_tokens
    if num_pairs > num_experts:
        room = num_pairs + (num_experts + 1) * (block_tokens - 1)
    return -(-room // 4) * 4


def dispatch(
    topk_ids: torch.Tensor,
    layer: int,
    *,
    num_rows: torch.Tensor,
    state: DeviceResidency,
    page_ins: PageIns,
    ids: torch.Tensor,
    block_tokens: int,
) -> Dispatched:
    """Make every routed expert of the layer a resident: table and blocks say so at once, and `page_in` must follow before its
    frame is read.

    `topk_ids`: int32 or int64 `[T, k]`, and what is no expert's id routes nowhere; `num_rows`: int32 `[1]`, rows behind it pad
    the step and need no experts; `ids`: int32 `[T, k]`, contiguous, gets the ids and -1 for those rows; `block_tokens`: a power
    of two. An expert that is needed now is never a victim; victims are the set's empty places and then those with the lowest
    keys. What finds no place, or has no block in host memory, stays absent and is added to `state.shortfall`; its pairs, and
    those of no expert, are in blocks that are ABSENT. Missing experts go by their ids, so the result depends on nothing but its
    arguments. May be captured.
    """
    num_pairs, top_k = topk_ids.numel(), topk_ids.shape[1]
    num_experts, max_frames = state.frame_table.shape[1], state.set_frames.shape[1]
    experts = triton.next_power_of_2(num_experts)
    room = room_for(num_pairs, num_experts=num_experts, block_tokens=block_tokens)
    ranks, pairs, frames, num_padded = (
        torch.empty(size, dtype=torch.int32, device=topk_ids.device)
        for size in (num_pairs, room, triton.cdiv(room, block_tokens), 1)
    )
    dispatch_kernel[(1,)](
        topk_ids.contiguous(),
        num_rows,
        state.frame_table,
        state.block_of,
        state.set_frames,
        state.set_owners,
        state.set_keys,
        state.set_sizes,
        state.used_key,
        state.shortfall,
        page_ins.sources,
        page_ins.frames,
        page_ins.count,
        ids,
        ranks,
        pairs,
        frames,
        num_padded,
        layer,
        num_pairs,
        top_k,
        num_experts,
        max_frames,
        EXPERTS=experts,
        FRAMES=triton.next_power_of_2(max_frames),
        IDS=ids_at_a_time(num_pairs, experts),
        BLOCK_TOKENS=block_tokens,
        PAIRS=PAIRS_AT_A_TIME,
        num_warps=num_warps(max(num_experts, max_frames)),
    )
    return Dispatched(pairs, frames, num_padded)
