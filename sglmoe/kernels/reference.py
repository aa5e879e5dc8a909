"""What each kernel must do, in plain torch on a CPU. Arguments and results are those of the function of the same name."""

import torch

from sglmoe.kernels.dispatch import Dispatched
from sglmoe.kernels.exponent_codec.page_in_packed import NOT_CODED, PackedBlocks
from sglmoe.kernels.exponent_codec.reference import decode_first
from sglmoe.kernels.mailbox import Mailbox
from sglmoe.kernels.residency import DeviceResidency, PageIns

ABSENT = -1


def frames_of_blocks(
    expert_ids: torch.Tensor,
    num_padded: torch.Tensor,
    frame_table: torch.Tensor,
    block_tokens: int,
) -> torch.Tensor:
    """The frame of each block's expert: ABSENT of one that is absent or none, and of blocks that are not in use."""
    num_used = int(num_padded) // block_tokens
    frames = torch.full_like(expert_ids, ABSENT)
    for block in range(num_used):
        expert = int(expert_ids[block])
        if 0 <= expert < len(frame_table):
            frames[block] = frame_table[expert]
    return frames


def wave_blocks(
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_padded: torch.Tensor,
    *,
    frame_table: torch.Tensor,
    block_tokens: int,
    num_pairs: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `blocks.wave_blocks`."""
    frames = frames_of_blocks(expert_ids, num_padded, frame_table, block_tokens)
    mine = (frames != ABSENT).nonzero().flatten().tolist()
    wave_sorted = torch.full_like(sorted_ids, num_pairs)
    wave_frames = torch.full_like(expert_ids, ABSENT)
    for place, block in enumerate(mine):
        rows = sorted_ids[block * block_tokens : (block + 1) * block_tokens]
        wave_sorted[place * block_tokens : (place + 1) * block_tokens] = rows
        wave_frames[place] = frames[block]
    return wave_sorted, wave_frames, torch.full_like(num_padded, len(mine) * block_tokens)


def page_in(
    blocks: torch.Tensor,
    arena: torch.Tensor,
    *,
    frame_bytes: int,
    sources: torch.Tensor,
    frames: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """See `page_in.page_in`."""
    for source, frame in zip(sources[: int(count)], frames[: int(count)], strict=True):
        arena.view(-1, frame_bytes)[frame, : blocks.shape[1]] = blocks[source]


def page_in_packed(
    blocks: torch.Tensor,
    arena: torch.Tensor,
    *,
    frame_bytes: int,
    its: PackedBlocks,
    sources: torch.Tensor,
    frames: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """See `page_in_packed.page_in_packed`."""
    for source, frame in zip(sources[: int(count)], frames[: int(count)], strict=True):
        places = zip(its.parts.tolist(), its.stored[source].tolist(), strict=True)
        for (_, offset, num_bytes), (start, num_escapes) in places:
            stored = blocks[source, start:]
            if num_escapes == NOT_CODED:
                values = stored[:num_bytes]
            else:
                values = torch.from_numpy(decode_first(stored.numpy())).view(torch.uint8)
            arena.view(-1, frame_bytes)[frame, offset : offset + num_bytes] = values


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
    """See `dispatch.dispatch`; no more than what is in use."""
    ids.copy_(topk_ids)
    ids[int(num_rows) :] = -1
    num_experts = state.frame_table.shape[1]
    routed = [its if 0 <= its < num_experts else None for its in ids.flatten().tolist()]
    bring_in({its for its in routed if its is not None}, layer, state, page_ins)
    pairs: list[int] = []
    frames: list[int] = []
    for expert in [*range(num_experts), None]:
        run = [pair for pair, its in enumerate(routed) if its == expert]
        run += [len(routed)] * (-len(run) % block_tokens)
        frame = ABSENT if expert is None else int(state.frame_table[layer, expert])
        pairs += run
        frames += [frame] * (len(run) // block_tokens)
    return Dispatched(
        *(torch.tensor(its, dtype=torch.int32) for its in (pairs, frames, [len(pairs)]))
    )


def bring_in(needed: set[int], layer: int, state: DeviceResidency, page_ins: PageIns) -> None:
    """Make these experts residents, as far as there are places."""
    table, blocks = state.frame_table[layer], state.block_of[layer]
    owners, keys = state.set_owners[layer], state.set_keys[layer]
    used, size = int(state.used_key), int(state.set_sizes[layer])
    for place in range(size):
        if int(owners[place]) in needed:
            keys[place] = used
    free = [place for place in range(size) if int(owners[place]) not in needed]
    free.sort(key=lambda place: (-1 if owners[place] < 0 else int(keys[place]), place))
    missing = sorted(expert for expert in needed if table[expert] == ABSENT)
    served = [expert for expert in missing if blocks[expert] >= 0][: len(free)]
    for index, (expert, place) in enumerate(zip(served, free, strict=False)):
        if owners[place] >= 0:
            table[owners[place]] = ABSENT
        table[expert] = state.set_frames[layer, place]
        owners[place], keys[place] = expert, used
        page_ins.sources[index], page_ins.frames[index] = blocks[expert], table[expert]
    page_ins.count[0] = len(served)
    state.shortfall.add_(len(missing) - len(served))


def post(mailbox: Mailbox, *, layer: int, expert: int, frame: int, step: int) -> None:
    """See `mailbox.post`."""
    number = int(mailbox.posted[layer])
    room = mailbox.letters.shape[1]
    mailbox.letters[layer, number % room] = torch.tensor([expert, frame, step], dtype=torch.int32)
    mailbox.posted[layer] = number + 1


def commit(mailbox: Mailbox, layer: int, state: DeviceResidency, *, step: torch.Tensor) -> None:
    """See `mailbox.commit`."""
    room, until = mailbox.letters.shape[1], int(mailbox.posted[layer])
    for number in range(max(int(mailbox.committed[layer]), until - room), until):
        expert, frame, its_step = mailbox.letters[layer, number % room].tolist()
        if its_step != int(step):
            continue
        place = int(state.set_sizes[layer])
        is_new = int(state.frame_table[layer, expert]) == ABSENT
        if is_new:
            state.frame_table[layer, expert] = frame
        state.set_frames[layer, place] = frame
        state.set_owners[layer, place] = expert if is_new else -1
        state.set_keys[layer, place] = state.used_key - 1
        state.set_sizes[layer] += 1
    mailbox.committed[layer] = mailbox.posted[layer]
