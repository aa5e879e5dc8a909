"""Memory that processes share and that has no name: it is gone with the last of them, however that ends."""

import mmap
import os
import weakref
from multiprocessing import reduction
from typing import Any


class NamelessMemory:
    """So many bytes, zero at first. May be handed to a process that is being started."""

    def __init__(self, num_bytes: int):
        file = os.memfd_create("sglmoe")
        os.ftruncate(file, num_bytes)
        self._map(file)

    def _map(self, file: int) -> None:
        self._file = file
        weakref.finalize(self, os.close, file)
        self.bytes = memoryview(mmap.mmap(file, os.fstat(file).st_size))

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self._file),)


def _received(file: Any) -> NamelessMemory:
    """In the other process."""
    memory = NamelessMemory.__new__(NamelessMemory)
    memory._map(file.detach())
    return memory
