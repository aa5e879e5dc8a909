"""How an expert's bytes, once on their way to a device, get into its frame: as they come, or decoded there.

All is queued on the current stream. The logic is tested on a CPU; no GPU has run it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch

from sglmoe.memory.experts import Load, PackedCell
from sglmoe.memory.small_copies import on_device
from sglmoe.memory.staging import ALIGN_BYTES, NUM_STAGED, row_bytes
from sglmoe.memory.store import ExpertStore, StoredPart

VALUE_BYTES = 2


class Frames(Protocol):
    """Where experts go."""

    def place(self, load: Load, num_bytes: int) -> torch.Tensor:
        """Where to queue a copy of the expert's bytes, uint8 `[num_bytes]`, before anything else is asked of this."""

    def unpack(self, load: Load) -> None:
        """The expert's bytes are in its cell, which is filled."""

    def flush(self) -> None:
        """Queue what is left to do for the experts that were named since the last time."""

    def forget(self) -> None:
        """Those experts are not wanted in their frames any more."""


class PlainFrames:
    """Experts that come as they lie in a frame, and are never packed. `frames` is uint8 `[num_frames, frame_bytes]` on the
    device."""

    def __init__(self, frames: torch.Tensor):
        self._frames = frames

    def place(self, load: Load, num_bytes: int) -> torch.Tensor:
        return self._frames[load.frame, :num_bytes]

    def unpack(self, load: Load) -> None:
        raise AssertionError(f"{load}: nothing is packed here")

    def flush(self) -> None:
        pass

    def forget(self) -> None:
        pass


# Tensor i begins at byte `sources[i]` of `packed` and goes to value `targets[i]` of `target`: as `decode_tensors`.
Decode = Callable[..., None]


Piece: TypeAlias = tuple[int, int]  # bytes of the arena: start, stop


class PackedPart(NamedTuple):
    """A tensor that is in one piece on the device, from byte `start` of the staging area or of the arena on."""

    frame: int  # that it goes to
    part: StoredPart
    is_staged: bool
    start: int


class DecodedFrames:
    """Experts that come as they are stored: copied to a staging area, and from there to their cells, if they have any; or
    that are in these cells already. They are decoded from where they are, many in one launch for each of their tensors.

    A tensor that lies in two frames is staged too. What is queued later waits for what is queued before, so nothing else
    keeps two uses of anything apart.
    """

    def __init__(
        self,
        frames: torch.Tensor,
        store: ExpertStore,
        *,
        num_staged: int = NUM_STAGED,
        decode: Decode | None = None,
    ):
        if decode is None:
            from sglmoe.kernels.exponent_codec.decode_gpu import decode_tensors

            decode = decode_tensors
        self._decode = decode
        self._frames = frames
        self._arena = frames.view(-1)
        self._store = store
        self._staging = frames.new_empty((num_staged, staged_bytes(store)))
        self._num_staged = 0
        self._to_keep: list[tuple[PackedCell, torch.Tensor]] = []  # and what is staged of it
        self._to_decode: list[list[PackedPart]] = []  # by expert

    def place(self, load: Load, num_bytes: int) -> torch.Tensor:
        row = self._take_row()
        parts = self._store.stored_parts(load.layer, load.expert)
        start = row * self._staging.shape[1]
        self._to_decode.append(
            [PackedPart(load.frame, its, True, start + its.stored_offset) for its in parts]
        )
        if load.cell is not None:
            stored_bytes = parts[-1].stored_offset + parts[-1].stored_bytes
            self._to_keep.append((load.cell, self._staging[row, :stored_bytes]))
        return self._staging[row, :num_bytes]

    def unpack(self, load: Load) -> None:
        assert load.cell is not None
        parts = self._store.stored_parts(load.layer, load.expert)
        pieces = [
            pieces_of(load.cell.runs, its.stored_offset, its.stored_offset + its.stored_bytes)
            for its in parts
        ]
        is_split = any(len(its) > 1 for its in pieces)
        row = self._take_row() if is_split else None
        self._to_decode.append(
            [
                self._in_one_piece(load.frame, part, its, row)
                for part, its in zip(parts, pieces, strict=True)
            ]
        )

    def flush(self) -> None:
        to_keep, self._to_keep = self._to_keep, []
        to_decode, self._to_decode = self._to_decode, []
        self._num_staged = 0
        for cell, stored in to_keep:
            pieces = pieces_of(cell.runs, 0, stored.numel())
            self._copy_pieces(pieces, stored, into_arena=True)
        for parts in zip(*to_decode, strict=True):
            for is_staged in (True, False):
                self._decode_from(is_staged, [its for its in parts if its.is_staged == is_staged])

    def forget(self) -> None:
        self._to_keep, self._to_decode, self._num_staged = [], [], 0

    def _take_row(self) -> int:
        if self._num_staged == len(self._staging):
            self.flush()
        self._num_staged += 1
        return self._num_staged - 1

    def _in_one_piece(
        self, frame: int, part: StoredPart, pieces: list[Piece], row: int | None
    ) -> PackedPart:
        """A tensor that is in a cell; what lies in two frames is copied to a row of the staging area."""
        if len(pieces) == 1:
            return PackedPart(frame, part, False, pieces[0][0])
        assert row is not None
        self._copy_pieces(pieces, self._staging[row, part.stored_offset :], into_arena=False)
        start = row * self._staging.shape[1] + part.stored_offset
        return PackedPart(frame, part, True, start)

    def _copy_pieces(self, pieces: list[Piece], memory: torch.Tensor, *, into_arena: bool) -> None:
        """Between these pieces of the arena and the beginning of `memory`."""
        done = 0
        for start, stop in pieces:
            its, other = self._arena[start:stop], memory[done : done + stop - start]
            target, source = (its, other) if into_arena else (other, its)
            target.copy_(source, non_blocking=True)
            done += stop - start

    def _decode_from(self, is_staged: bool, parts: Sequence[PackedPart]) -> None:
        """One tensor of each of several experts; they are as large as each other."""
        memory = self._staging.view(-1) if is_staged else self._arena
        sources, targets = [], []
        for frame, part, _, start in parts:
            if part.is_packed:
                sources.append(start)
                targets.append((frame * self._frames.shape[1] + part.offset) // VALUE_BYTES)
            else:
                target = self._frames[frame, part.offset : part.offset + part.num_bytes]
                target.copy_(memory[start : start + part.num_bytes], non_blocking=True)
        if sources:
            self._decode(
                memory,
                on_device(sources, self._frames.device),
                self._arena.view(torch.int16),
                on_device(targets, self._frames.device),
                num_values=parts[0].part.num_bytes // VALUE_BYTES,
            )


def pieces_of(runs: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """Bytes `start` to `stop` of a cell, where they are in the arena; runs that are neighbours are one piece."""
    pieces: list[Piece] = []
    for first, last in runs:
        piece = first + max(start, 0), min(first + stop, last)
        if piece[0] < piece[1]:
            if pieces and pieces[-1][1] == piece[0]:
                piece = pieces.pop()[0], piece[1]
            pieces.append(piece)
        start, stop = start - (last - first), stop - (last - first)
    return pieces


def staged_bytes(store: ExpertStore) -> int:
    """What one packed expert takes on the device."""
    return row_bytes(store.stored_expert_bytes())


def can_decode(store: ExpertStore, frame_bytes: int) -> bool:
    """Whether there is anything to decode, and every tensor of a frame lies where the decoder can write it; those of an
    expert as it is stored then lie where it can read them."""
    if not store.is_packed or frame_bytes % ALIGN_BYTES:
        return False
    parts = store.stored_parts(*store.experts()[0])
    return not any(part.offset % ALIGN_BYTES for part in parts)
