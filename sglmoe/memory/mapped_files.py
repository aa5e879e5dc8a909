"""Which bytes of which file a memory mapping shows, so that they can be read without being mapped.

A tensor that a loader took from a mapped checkpoint is a range of addresses. Reading the same bytes with `pread` costs no page
faults, and they do not stay in this process's resident set after that. Linux only; elsewhere nothing is found.
"""

import os
from bisect import bisect_right
from pathlib import Path

import msgspec

MAPS = Path("/proc/self/maps")


class UnreadableError(Exception):
    """Bytes of a file can't be had, or are not what they were. Says why."""


class Extent(msgspec.Struct, frozen=True, gc=False):
    """`nbytes` bytes of an open file, from `offset` on."""

    descriptor: int
    offset: int
    nbytes: int
    path: str  # for messages

    def read_into(self, target: memoryview, start: int = 0) -> None:
        """Fill `target` from byte `start` of the extent on. Raises UnreadableError, also where the file has become shorter."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self.descriptor, [target[done:]], self.offset + start + done)
            except OSError as error:
                raise UnreadableError(str(error)) from error
            if count == 0:
                raise UnreadableError(f"the file ends {len(target) - done} bytes early")
            done += count

    def will_read(self) -> None:
        """Have the kernel begin to read it all into the page cache."""
        os.posix_fadvise(self.descriptor, self.offset, self.nbytes, os.POSIX_FADV_WILLNEED)


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
        offset = mapping.offset + address - mapping.start
        return Extent(self._open(mapping.path), offset, nbytes, mapping.path)

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
