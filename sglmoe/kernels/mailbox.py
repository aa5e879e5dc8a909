"""How a prefetched expert joins its layer in the middle of a step, without the host.

A frame that a prefetch fills is in no set, so no table names it and nothing of the step touches it. The prefetch stream copies
the expert there, and behind the copy runs `post`: it writes a letter, then counts it with a release. At the layer's boundary
the compute stream runs `commit`: it reads the count with an acquire, and whoever sees a letter counted sees the letter and
all bytes that were copied before it. A letter is for one step: of what comes too late the host learns by itself.
"""

import msgspec
import torch
import triton
import triton.language as tl

from sglmoe.kernels.residency import DeviceResidency


class Mailbox(msgspec.Struct, frozen=True, eq=False):
    """One for all L layers, int32, on the device, with room for as many letters as a step may have of a layer."""

    letters: torch.Tensor  # [L, room, 3]: expert, frame, the step that it is for
    posted: torch.Tensor  # [L], letters ever posted; only the prefetch stream writes it
    committed: torch.Tensor  # [L], letters ever read; only the compute stream writes it

    @classmethod
    def empty(cls, num_layers: int, room: int, device: str) -> "Mailbox":
        """No letters."""
        return cls(
            letters=torch.zeros((num_layers, room, 3), dtype=torch.int32, device=device),
            posted=torch.zeros(num_layers, dtype=torch.int32, device=device),
            committed=torch.zeros(num_layers, dtype=torch.int32, device=device),
        )


@triton.jit(do_not_specialize=["layer", "expert", "frame", "step", "room"])
def post_kernel(
    letters: tl.tensor,
    posted: tl.tensor,
    layer: tl.tensor,
    expert: tl.tensor,
    frame: tl.tensor,
    step: tl.tensor,
    room: tl.tensor,
) -> None:
    """Write the letter, then count it."""
    number = tl.load(posted + layer)
    letter = letters + (layer * room + number % room) * 3
    tl.store(letter, expert)
    tl.store(letter + 1, frame)
    tl.store(letter + 2, step)
    tl.debug_barrier()
    tl.atomic_xchg(posted + layer, number + 1, sem="release", scope="gpu")


@triton.jit(do_not_specialize=["layer", "room", "num_experts", "max_frames"])
def commit_kernel(
    letters: tl.tensor,
    posted: tl.tensor,
    committed: tl.tensor,
    frame_table: tl.tensor,
    set_frames: tl.tensor,
    set_owners: tl.tensor,
    set_keys: tl.tensor,
    set_sizes: tl.tensor,
    used_key: tl.tensor,
    step: tl.tensor,
    layer: tl.tensor,
    room: tl.tensor,
    num_experts: tl.tensor,
    max_frames: tl.tensor,
) -> None:
    """Read what is counted and not committed, and put the frame of each letter for this step into the set."""
    until = tl.atomic_add(posted + layer, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    number = tl.maximum(tl.load(committed + layer), until - room)
    size = tl.load(set_sizes + layer)
    now, key = tl.load(step), tl.load(used_key) - 1
    while number < until:
        letter = letters + (layer * room + number % room) * 3
        expert = tl.load(letter, volatile=True)
        frame = tl.load(letter + 1, volatile=True)
        is_mine = tl.load(letter + 2, volatile=True) == now
        place = layer * max_frames + size
        row = frame_table + layer * num_experts + expert
        # One that a miss has brought in meanwhile keeps its frame; this one is empty then.
        is_new = is_mine & (tl.load(row) < 0)
        tl.store(row, frame, mask=is_new)
        tl.store(set_frames + place, frame, mask=is_mine)
        tl.store(set_owners + place, tl.where(is_new, expert, -1), mask=is_mine)
        tl.store(set_keys + place, key, mask=is_mine)
        tl.debug_barrier()  # the next letter may be of the same expert
        size += is_mine.to(tl.int32)
        number += 1
    tl.store(set_sizes + layer, size)
    tl.store(committed + layer, number)


def post(mailbox: Mailbox, *, layer: int, expert: int, frame: int, step: int) -> None:
    """Say that the expert's bytes are in the frame, once all that was queued on this stream before is done; to the step of
    that number alone."""
    post_kernel[(1,)](
        mailbox.letters,
        mailbox.posted,
        layer,
        expert,
        frame,
        step,
        mailbox.letters.shape[1],
        num_warps=1,
    )


def commit(mailbox: Mailbox, layer: int, state: DeviceResidency, *, step: torch.Tensor) -> None:
    """Put the frames of letters that have been posted for this step into the layer's set, to change hands after all that
    it does not use; in front of its `dispatch`. `step`: int32 `[1]`, the number of the one that runs.

    The set must have room for all of a step. May be captured.
    """
    commit_kernel[(1,)](
        mailbox.letters,
        mailbox.posted,
        mailbox.committed,
        state.frame_table,
        state.set_frames,
        state.set_owners,
        state.set_keys,
        state.set_sizes,
        state.used_key,
        step,
        layer,
        mailbox.letters.shape[1],
        state.frame_table.shape[1],
        state.set_frames.shape[1],
        num_warps=1,
    )
