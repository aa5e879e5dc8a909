"""Memory that is only taken where it is touched."""

import mmap

import torch

MAP_NORESERVE = 0x4000  # Linux


def vast_bytes(num_bytes: int) -> torch.Tensor:
    """Zeros, uint8 `[num_bytes]`, more than the machine may have."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=torch.uint8)
