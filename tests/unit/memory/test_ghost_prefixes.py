"""Evicted prefixes that are asked for again. A page is 2 tokens, 8 bytes of ids."""

from zlib import crc32

import numpy as np

from sglmoe.memory.ghost_prefixes import MAX_GHOSTS, Ghost, GhostPrefixes

SEED = crc32(b"namespace")


def ids(*tokens: int) -> bytes:
    return np.array(tokens, np.int32).tobytes()


def remember(ghosts: GhostPrefixes, before: bytes, tokens: bytes, idle_since: int = 0) -> None:
    ghosts.remember(crc32(before, SEED), tokens, num_uses=1, idle_since=idle_since)


def recall(ghosts: GhostPrefixes, tokens: bytes, num_known: int) -> list[Ghost]:
    return list(ghosts.recall(SEED, tokens, num_known))


def test_runs_are_recalled_in_order_and_once() -> None:
    # 1 2 | 3 4 | 5 6 | 7 8 was cached; the last page was evicted first, then the two before it.
    ghosts = GhostPrefixes(page_bytes=8)
    remember(ghosts, ids(1, 2, 3, 4, 5, 6), ids(7, 8), idle_since=5)
    remember(ghosts, ids(1, 2), ids(3, 4, 5, 6), idle_since=5)
    again = ids(1, 2, 3, 4, 5, 6, 7, 8, 9, 9)
    assert [g.num_pages for g in recall(ghosts, again, 8)] == [2, 1]
    assert recall(ghosts, again, 8) == []


def test_what_diverges_within_a_run_counts_for_its_first_page() -> None:
    ghosts = GhostPrefixes(page_bytes=8)
    remember(ghosts, b"", ids(1, 2, 3, 4, 5, 6))
    assert [g.num_pages for g in recall(ghosts, ids(1, 2, 3, 4, 0, 0), 0)] == [1]
    # The end of a prompt within a run is such a divergence too.
    remember(ghosts, b"", ids(1, 2, 3, 4))
    assert [g.num_pages for g in recall(ghosts, ids(1, 2), 0)] == [1]


def test_another_beginning_or_namespace_is_another_prefix() -> None:
    ghosts = GhostPrefixes(page_bytes=8)
    remember(ghosts, ids(1, 2), ids(3, 4))
    assert recall(ghosts, ids(9, 2, 3, 4), 8) == []
    assert list(ghosts.recall(crc32(b"other"), ids(1, 2, 3, 4), 8)) == []
    assert len(recall(ghosts, ids(1, 2, 3, 4), 8)) == 1


def test_the_oldest_are_forgotten() -> None:
    ghosts = GhostPrefixes(page_bytes=8)
    for token in range(MAX_GHOSTS + 1):
        remember(ghosts, b"", ids(token, 0))
    assert recall(ghosts, ids(0, 0), 0) == []
    assert len(recall(ghosts, ids(1, 0), 0)) == 1
