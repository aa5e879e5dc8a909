"""Which experts a layer brings in, and whom they replace: decided on the device, within the layer's frame set.

A layer's frame set is the frames that the host has lent it. During a step only the device writes the state below; between steps
only the host, which may take frames out of sets, put others in, and read what the device has made of them.
"""

import msgspec
import torch
import triton
import triton.language as tl

IDS_AT_A_TIME = 16  # arbitrary: compared with all experts at once


class DeviceResidency(msgspec.Struct, frozen=True, eq=False):
    """The state of all L layers, int32, at addresses that never change. E experts; a set has at most F frames."""

    frame_table: torch.Tensor  # [L, E], the frame of each expert, -1: absent
    block_of: (
        torch.Tensor
    )  # [L, E], the block of host memory with its bytes, -1: none; written by the host
    set_frames: torch.Tensor  # [L, F], the frames of the set; the first `set_sizes` count
    set_owners: torch.Tensor  # [L, F], the expert in each of them, -1: none
    set_keys: (
        torch.Tensor
    )  # [L, F], the lowest changes hands first: what each is worth, or when it was last used
    set_sizes: torch.Tensor  # [L]
    used_key: torch.Tensor  # [1], at least 0: the key of what this step uses; others are lower
    # Routed experts that could not be made resident: the step's output means nothing then, and the host, which sets this to 0
    # before a step, computes the step again in waves.
    shortfall: torch.Tensor  # [1]

    @classmethod
    def empty(
        cls, num_layers: int, num_experts: int, max_frames: int, device: str
    ) -> "DeviceResidency":
        """No frames, no experts."""

        def full(value: int, *shape: int) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        return cls(
            frame_table=full(-1, num_layers, num_experts),
            block_of=full(-1, num_layers, num_experts),
            set_frames=full(-1, num_layers, max_frames),
            set_owners=full(-1, num_layers, max_frames),
            set_keys=full(0, num_layers, max_frames),
            set_sizes=full(0, num_layers),
            used_key=full(0, 1),
            shortfall=full(0, 1),
        )


class PageIns(msgspec.Struct, frozen=True, eq=False):
    """What `page_in` is to copy, int32: the first `count` of F."""

    sources: torch.Tensor  # [F], blocks of host memory
    frames: torch.Tensor  # [F]
    count: torch.Tensor  # [1]


def num_warps(num_experts: int) -> int:
    """Four take 254 of the 255 registers that a thread can have at 512 experts, and half of that at 256."""
    return 4 if num_experts <= 256 else 8


@triton.jit
def is_among(
    values: tl.tensor, topk_ids: tl.tensor, num_ids: tl.tensor, IDS: tl.constexpr
) -> tl.tensor:
    """Which of the values are routed ids; a negative one is none."""
    found = values < values
    for start in range(0, num_ids, IDS):
        at = start + tl.arange(0, IDS)
        ids = tl.load(topk_ids + at, mask=at < num_ids, other=-1)
        is_same = (values[:, None] == ids[None, :]) & (ids >= 0)[None, :]
        found |= tl.max(is_same.to(tl.int32), axis=1) != 0
    return found


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


@triton.jit(do_not_specialize=["layer", "num_ids", "num_experts", "max_frames"])
def decide_kernel(
    topk_ids: tl.tensor,
    frame_table: tl.tensor,
    block_of: tl.tensor,
    set_frames: tl.tensor,
    set_owners: tl.tensor,
    set_keys: tl.tensor,
    set_sizes: tl.tensor,
    used_key: tl.tensor,
    shortfall: tl.tensor,
    sources: tl.tensor,
    frames: tl.tensor,
    count: tl.tensor,
    layer: tl.tensor,
    num_ids: tl.tensor,
    num_experts: tl.tensor,
    max_frames: tl.tensor,
    EXPERTS: tl.constexpr,
    FRAMES: tl.constexpr,
    IDS: tl.constexpr,
) -> None:
    """One program. Missing experts are served in the order of their ids, each by the free place that is first."""
    frame_table += layer * num_experts
    block_of += layer * num_experts
    set_frames += layer * max_frames
    set_owners += layer * max_frames
    set_keys += layer * max_frames
    expert, place = tl.arange(0, EXPERTS), tl.arange(0, FRAMES)
    is_expert, is_place = expert < num_experts, place < tl.load(set_sizes + layer)
    is_absent = tl.load(frame_table + expert, mask=is_expert, other=0) < 0
    has_block = tl.load(block_of + expert, mask=is_expert, other=-1) >= 0
    owner = tl.load(set_owners + place, mask=is_place, other=-1)
    key = tl.load(set_keys + place, mask=is_place, other=0)

    is_needed = is_expert & is_among(expert, topk_ids, num_ids, IDS)
    is_kept = is_among(owner, topk_ids, num_ids, IDS)
    used = tl.load(used_key)
    key = tl.where(is_kept, used, key)
    is_missing, is_free = is_needed & is_absent, is_place & ~is_kept
    is_served = is_missing & has_block
    num_served = tl.minimum(how_many(is_served), how_many(is_free))
    next_expert = tl.where(is_served, expert, EXPERTS)
    rank = order(place, owner, key, is_free, FRAMES)
    tl.debug_barrier()  # the loads of all warps come before the first store
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
        next_expert = tl.where(expert == newcomer, EXPERTS, next_expert)
        rank = tl.where(place == victim, 2**62, rank)
        key = tl.where(place == victim, used, key)
    tl.store(set_keys + place, key, mask=is_place)
    tl.store(count, num_served)
    tl.store(shortfall, tl.load(shortfall) + how_many(is_missing) - num_served)


def decide(
    topk_ids: torch.Tensor, layer: int, *, state: DeviceResidency, page_ins: PageIns
) -> None:
    """Make every routed expert of the layer a resident: the table says so at once, and `page_in` must follow before it is read.

    `topk_ids`: int32, any shape, contiguous; negative ids are padding. An expert that is needed now is never a victim;
    victims are the set's empty places and then those with the lowest keys. What finds no place, or has no block in host memory,
    stays absent and is added to `state.shortfall`. Missing experts go by their ids, so the result depends on nothing but its
    arguments.
    """
    num_experts, max_frames = state.frame_table.shape[1], state.set_frames.shape[1]
    width = triton.next_power_of_2(max(num_experts, max_frames))
    decide_kernel[(1,)](
        topk_ids,
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
        layer,
        topk_ids.numel(),
        num_experts,
        max_frames,
        EXPERTS=triton.next_power_of_2(num_experts),
        FRAMES=triton.next_power_of_2(max_frames),
        IDS=IDS_AT_A_TIME,
        num_warps=num_warps(width),
    )
