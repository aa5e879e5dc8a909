"""Prefixes that were evicted lately, as checksums: who asks for one again would have found it.

A checksum may fit another prefix, once in 4 billion: what comes of that is a count, never an answer.
"""

from collections import OrderedDict
from collections.abc import Iterator
from zlib import crc32

import msgspec

MAX_GHOSTS = 8192  # arbitrary; each takes about 200 bytes


class Ghost(msgspec.Struct, frozen=True, gc=False):
    """A run of pages that was evicted at once."""

    num_pages: int
    num_uses: int  # these and the next as the node had them
    idle_since: int
    checksum: int  # of all tokens up to its end


class GhostPrefixes:
    """The last evicted runs, by the checksum of all tokens up to the end of their first page."""

    def __init__(self, *, page_bytes: int):
        self._page_bytes = page_bytes  # of token ids, not of KV
        self._ghosts: OrderedDict[int, Ghost] = OrderedDict()

    def clear(self) -> None:
        """Forget all."""
        self._ghosts.clear()

    def remember(
        self, before: int, tokens: bytes | bytearray, *, num_uses: int, idle_since: int
    ) -> None:
        """`tokens`: those of the evicted pages; `before`: the checksum of all tokens before them."""
        first = crc32(tokens[: self._page_bytes], before)
        self._ghosts[first] = Ghost(
            len(tokens) // self._page_bytes, num_uses, idle_since, crc32(tokens, before)
        )
        self._ghosts.move_to_end(first)
        if len(self._ghosts) > MAX_GHOSTS:
            self._ghosts.popitem(last=False)

    def recall(self, seed: int, tokens: bytes, num_known: int) -> Iterator[Ghost]:
        """The runs that continue the first `num_known` bytes of `tokens`, in order; they are
        forgotten. `seed`: the checksum of the namespace. A run that goes on otherwise than
        `tokens` counts for its first page."""
        if not self._ghosts:
            return
        checksum = crc32(memoryview(tokens)[:num_known], seed)
        while num_known + self._page_bytes <= len(tokens):
            first = crc32(tokens[num_known : num_known + self._page_bytes], checksum)
            ghost = self._ghosts.pop(first, None)
            if ghost is None:
                return
            end = num_known + ghost.num_pages * self._page_bytes
            checksum = crc32(memoryview(tokens)[num_known:end], checksum)
            if checksum != ghost.checksum:
                yield msgspec.structs.replace(ghost, num_pages=1)
                return
            yield ghost
            num_known = end
