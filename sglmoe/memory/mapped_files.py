"""Which bytes of which file a memory mapping shows, so that they can be read without being mapped.

A tensor that a loader took from a mapped checkpoint is a range of addresses. Reading the same bytes with `pread` costs no page
faults, and they do not stay in this process's resident set after that. Linux only; elsewhere nothing is found.
"""

import os
from bisect import bisect_right
from pathlib import Path

import msgspec

MAPS = Path("/proc/self/maps")


class Extent(msgspec.Struct, frozen=True, gc=False):
    """`nbytes` bytes of an open file, from `offset` on."""

    descriptor: int
    offset: int
    nbytes: int

    def read_into(self, target: memoryview) -> None:
        """Fill `target`, which is as long as the extent. Raises OSError, also where the file has become shorter."""
        done = 0
        while done < self.nbytes:
            count = os.preadv(self.descriptor, [target[done:]], self.offset + done)
            if count == 0:
                raise OSError(
                    f"the checkpoint ends {self.nbytes - done} bytes early: was it replaced while being served?"
                )
            done += count


class Mapping(msgspec.Struct, frozen=True, gc=False):
    """Addresses `[start, stop)` show the file from `offset` on."""

    start: int
    stop: int
    offset: int
    path: str


class MappedFiles:
    """The files mapped into this process at one moment. Opens those that are asked for; they stay open."""

    def __init__(self) -> None:
        self._mappings = read_mappings()
        self._starts = [mapping.start for mapping in self._mappings]
        self._descriptors: dict[str, int] = {}

    def extent(self, address: int, nbytes: int) -> Extent | None:
        """Where the file has the bytes at `address`; None if they are not, all of them, one file's."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        mapping = self._mappings[index]
        if address + nbytes > mapping.stop:
            return None
        return Extent(self._open(mapping.path), mapping.offset + address - mapping.start, nbytes)

    def _open(self, path: str) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[path]


def read_mappings() -> list[Mapping]:
    """All mappings of regular files, by address."""
    if not MAPS.exists():
        return []
    mappings = []
    for line in MAPS.read_text().splitlines():
        # address perms offset dev inode path; a path may have spaces
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[4] != "0" and os.path.isfile(fields[5]):
            start, stop = (int(part, 16) for part in fields[0].split("-"))
            mappings.append(Mapping(start, stop, int(fields[2], 16), fields[5]))
    return sorted(mappings, key=lambda mapping: mapping.start)
