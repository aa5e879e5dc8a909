"""The state by which a layer brings experts in without the host (`dispatch.py`), within its frame set.

A layer's frame set is the frames that the host has lent it. During a step only the device writes the state below; between steps
only the host, which may take frames out of sets, put others in, and read what the device has made of them.
"""

import msgspec
import torch


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
    # Routed experts that could not be made resident: the step's output means nothing then. The host, which sets this to 0
    # before a step, lends so many frames that there are none.
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
