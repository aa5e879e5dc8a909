"""Memory that is only taken where it is touched, and memory that ends."""

import ctypes
import mmap

import torch

MAP_NORESERVE = 0x4000  # Linux


def vast_bytes(num_bytes: int) -> torch.Tensor:
    """Zeros, uint8 `[num_bytes]`, more than the machine may have."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=torch.uint8)


def last_bytes(num_bytes: int) -> torch.Tensor:
    """Zeros, uint8 `[num_bytes]`; who reads what is behind them is ended by the system."""
    num_pages = -(-num_bytes // mmap.PAGESIZE)
    memory = vast_bytes((num_pages + 1) * mmap.PAGESIZE)
    behind = num_pages * mmap.PAGESIZE
    page = ctypes.c_void_p(memory.data_ptr() + behind)
    assert ctypes.CDLL(None).mprotect(page, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return memory[behind - num_bytes : behind]
