"""How an expert's bytes, once on their way to a device, get into its frame: as they come, or decoded there.

All is queued on the current stream. The logic is tested on a CPU; no GPU has run it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from sglmoe.memory.experts import Load
from sglmoe.memory.store import ExpertStore, StoredPart

VALUE_BYTES = 2
# Arbitrary: so many experts are decoded in one launch at most, and have room in packed form on the device.
NUM_STAGED = 8
# What the decoder's loads and stores of whole words need.
ALIGN_BYTES = 16


class Frames(Protocol):
    """Where experts go."""

    def place(self, load: Load, num_bytes: int) -> torch.Tensor:
        """Where to queue a copy of the expert's bytes, uint8 `[num_bytes]`, before anything else is asked of this."""

    def flush(self) -> None:
        """Queue what is left to do for the experts whose places were asked for since the last time."""

    def forget(self) -> None:
        """Those experts are not wanted in their frames any more."""


class PlainFrames:
    """Experts that come as they lie in a frame. `frames` is uint8 `[num_frames, frame_bytes]` on the device."""

    def __init__(self, frames: torch.Tensor):
        self._frames = frames

    def place(self, load: Load, num_bytes: int) -> torch.Tensor:
        return self._frames[load.frame, :num_bytes]

    def flush(self) -> None:
        pass

    def forget(self) -> None:
        pass


# Tensor i begins at byte `sources[i]` of `packed` and goes to value `targets[i]` of `target`: as `decode_tensors`.
Decode = Callable[..., None]


class DecodedFrames:
    """Experts that come as they are stored: copied to a staging area, and decoded from there, many in one launch for
    each of their tensors. What is queued later waits for what is queued before, so nothing else keeps two uses apart.
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
        self._store = store
        self._staging = torch.empty(
            (num_staged, staged_bytes(store)), dtype=torch.uint8, device=frames.device
        )
        self._staged: list[Load] = []

    def place(self, load: Load, num_bytes: int) -> torch.Tensor:
        if len(self._staged) == len(self._staging):
            self.flush()
        self._staged.append(load)
        return self._staging[len(self._staged) - 1, :num_bytes]

    def flush(self) -> None:
        staged, self._staged = self._staged, []
        experts = [self._store.stored_parts(load.layer, load.expert) for load in staged]
        for parts in zip(*experts, strict=True):
            self._decode_part(staged, parts)

    def forget(self) -> None:
        self._staged = []

    def _decode_part(self, staged: Sequence[Load], parts: Sequence[StoredPart]) -> None:
        """One tensor of each staged expert; they are as large as each other."""
        sources, targets = [], []
        for row, (load, part) in enumerate(zip(staged, parts, strict=True)):
            source = row * self._staging.shape[1] + part.stored_offset
            if part.is_packed:
                sources.append(source)
                target = load.frame * self._frames.shape[1] + part.offset
                targets.append(target // VALUE_BYTES)
            else:
                stored = self._staging.view(-1)[source : source + part.num_bytes]
                frame = self._frames[load.frame, part.offset : part.offset + part.num_bytes]
                frame.copy_(stored, non_blocking=True)
        if sources:
            self._decode(
                self._staging.view(-1),
                torch.tensor(sources, device=self._frames.device),
                self._frames.view(-1).view(torch.int16),
                torch.tensor(targets, device=self._frames.device),
                num_values=parts[0].num_bytes // VALUE_BYTES,
            )


def staged_bytes(store: ExpertStore) -> int:
    """What one packed expert takes on the device."""
    return -(-store.stored_expert_bytes() // ALIGN_BYTES) * ALIGN_BYTES


def can_decode(store: ExpertStore, frame_bytes: int) -> bool:
    """Whether there is anything to decode, and every tensor of a frame lies where the decoder can write it; those of an
    expert as it is stored then lie where it can read them."""
    if not store.is_packed or frame_bytes % ALIGN_BYTES:
        return False
    parts = store.stored_parts(*store.experts()[0])
    return not any(part.offset % ALIGN_BYTES for part in parts)
