"""The tree of prefixes: pages of 2 tokens, written as letters ("ab" is one page)."""

from array import array

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Geometry
from sglmoe.memory.eviction import Clock, LeafOrder
from sglmoe.memory.prices import Prices
from sglmoe.memory.radix_cache import RadixCache, RadixNode
from sglmoe.memory.reuse_rates import ReuseRates

GEOMETRY = Geometry(
    num_frames=8,
    frame_bytes=1000,
    expert_bytes=1000,
    page_bytes=500,
    page_tokens=2,
    pages_per_frame=2,
    page_rows=16,
)


def tokens(text: str) -> bytes:
    return array("i", map(ord, text)).tobytes()


class Tree:
    """A tree with its order of eviction; every step is checked against the laws."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.reuse = ReuseRates()
        self.order: LeafOrder[RadixNode] = LeafOrder(
            MemoryPolicy.LRU, reuse=self.reuse, prices=Prices(GEOMETRY)
        )
        self.cache = RadixCache(page_tokens=2, order=self.order, clock=self.clock, reuse=self.reuse)
        self.locks: list[RadixNode] = []

    def admit(self, text: str, namespace: str = "") -> tuple[RadixNode, list[int]]:
        match = self.cache.match(tokens(text), namespace)
        node, _ = self.cache.lock(match, namespace)
        self.locks.append(node)
        self.check()
        return node, match.pages.tolist()

    def insert(self, node: RadixNode, text: str, *pages: int) -> tuple[RadixNode, list[int]]:
        inserted = self.cache.insert(node, tokens(text), array("i", pages))
        self.locks.remove(node)
        self.locks.append(inserted.node)
        self.check()
        return inserted.node, inserted.known_pages.tolist()

    def unlock(self, node: RadixNode) -> list[int]:
        self.clock.tick()
        unlocked = self.cache.unlock(node)
        self.locks.remove(node)
        self.check()
        return unlocked.tolist()

    def cached(self, text: str, *pages: int, namespace: str = "") -> None:
        """Add a prefix that nobody uses."""
        node, known = self.admit(text, namespace)
        rest = text[2 * len(known) :]
        self.unlock(self.insert(node, rest, *pages[len(known) :])[0])

    def match(self, text: str, namespace: str = "") -> list[int]:
        return self.cache.match(tokens(text), namespace).pages.tolist()

    def evict(self, num_pages: int) -> list[int]:
        leaf = self.order.first()
        assert leaf is not None
        pages = self.cache.evict(leaf, num_pages)
        self.check()
        return pages.tolist()

    def check(self) -> None:
        assert self.cache.violations(self.locks) == []


def test_longest_prefix_in_whole_pages() -> None:
    tree = Tree()
    tree.cached("abcdef", 7, 3, 5)
    assert tree.match("abcdefgh") == [7, 3, 5]
    assert tree.match("abcdeX") == [7, 3]
    assert tree.match("abcde") == [7, 3]
    assert tree.match("aXcdef") == []
    assert tree.match("") == []


def test_matching_changes_nothing() -> None:
    tree = Tree()
    tree.cached("abcd", 0, 1)
    before = [(node.key, node.last_use, node.locks) for node in tree.cache.nodes()]
    tree.match("abXX")
    tree.match("abcd", namespace="unknown")
    assert [(node.key, node.last_use, node.locks) for node in tree.cache.nodes()] == before


def test_a_diverging_prefix_splits_the_node() -> None:
    tree = Tree()
    tree.cached("abcdef", 0, 1, 2)
    tree.cached("abcdXY", 0, 1, 3)
    assert tree.match("abcdef") == [0, 1, 2]
    assert tree.match("abcdXY") == [0, 1, 3]
    assert sorted(node.pages.tolist() for node in tree.cache.nodes()) == [[], [0, 1], [2], [3]]


def test_a_split_below_a_request_moves_its_lock_too() -> None:
    tree = Tree()
    node, _ = tree.admit("abcdef")
    node, _ = tree.insert(node, "abcdef", 0, 1, 2)
    other, pages = tree.admit("abXX")
    assert pages == [0]
    assert (tree.cache.locked_pages, tree.cache.cached_pages) == (3, 0)
    # Only what the other doesn't use is let go, and the other way round.
    assert tree.unlock(node) == [1, 2]
    assert tree.unlock(other) == [0]
    assert (tree.cache.locked_pages, tree.cache.cached_pages) == (0, 3)


def test_inserting_what_is_known_returns_the_trees_pages() -> None:
    tree = Tree()
    first, _ = tree.admit("abcd")
    second, _ = tree.admit("abcdef")
    tree.insert(first, "abcd", 0, 1)
    second, known = tree.insert(second, "abcdef", 4, 5, 6)
    assert known == [0, 1]
    assert tree.match("abcdef") == [0, 1, 6]
    # The two leading pages are the first request's as well.
    assert tree.unlock(second) == [6]


def test_a_request_grows_its_own_leaf_but_not_a_shared_one() -> None:
    tree = Tree()
    node, _ = tree.admit("ab")
    leaf, _ = tree.insert(node, "ab", 0)
    assert tree.insert(leaf, "cd", 1)[0] is leaf
    tree.admit("abcd")
    assert tree.insert(leaf, "ef", 2)[0] is not leaf


def test_namespaces_share_nothing_and_unused_ones_vanish() -> None:
    tree = Tree()
    tree.cached("ab", 0, namespace="one")
    assert tree.match("ab", namespace="two") == []
    node, _ = tree.admit("ab", namespace="two")
    tree.unlock(node)
    assert tree.evict(9) == [0]
    assert list(tree.cache.nodes()) == []


def test_a_leaf_goes_from_its_end_and_then_its_parent() -> None:
    tree = Tree()
    tree.cached("abcdef", 0, 1, 2)
    tree.cached("abXXYY", 0, 3, 4)
    # The branch of 1, 2 was used first, the stem of page 0 last.
    assert tree.evict(1) == [2]
    assert tree.match("abcdef") == [0, 1]
    assert tree.evict(5) == [1]
    assert tree.evict(2) == [3, 4]
    assert tree.evict(1) == [0]
    assert tree.order.first() is None


def test_a_used_prefix_outlives_others() -> None:
    tree = Tree()
    tree.cached("ab", 0)
    tree.cached("cd", 1)
    tree.unlock(tree.admit("ab")[0])
    assert tree.evict(1) == [1]


def test_locking_tells_all_pages_that_nobody_had_locked() -> None:
    tree = Tree()
    tree.cached("abcd", 0, 1)
    tree.cached("abXX", 0, 2)
    tree.cached("abXXYY", 0, 2, 3)
    tree.admit("ab")
    match = tree.cache.match(tokens("abXXYY"), "")
    node, newly_locked = tree.cache.lock(match, "")
    tree.locks.append(node)
    tree.check()
    assert sorted(newly_locked) == [2, 3]


def test_locked_leaves_are_not_offered() -> None:
    tree = Tree()
    tree.cached("ab", 0)
    node, _ = tree.admit("ab")
    assert tree.order.first() is None
    tree.unlock(node)
    assert tree.evict(1) == [0]


def test_violations_notice_a_wrong_lock_and_a_wrong_count() -> None:
    tree = Tree()
    node, _ = tree.admit("ab")
    tree.insert(node, "ab", 0)
    assert tree.cache.violations([]) == [
        "the locks of the tree are not those of the running requests"
    ]
    tree.cache.cached_pages += 1
    assert tree.cache.violations(tree.locks) == [
        "locked and cached pages are counted wrong, they are 1, 0"
    ]
