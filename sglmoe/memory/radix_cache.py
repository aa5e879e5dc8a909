"""Which KV pages hold which tokens: a radix tree over whole pages, one root per namespace.

Keys are the tokens' int32 bytes, a page being ``4 * page_tokens`` of them, so that nodes compare by
memcmp and not token by token. The tree knows which pages are locked and which leaf may go; it knows
nothing of frames.

Locks are held by requests, on the path from a node to its root; a node that is not locked has no
locked node below it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from zlib import crc32

import numpy as np

from sglmoe.memory.eviction import NOT_QUEUED, Clock, LeafOrder
from sglmoe.memory.ghost_prefixes import GhostPrefixes
from sglmoe.memory.kv_pages import Pages, no_pages
from sglmoe.memory.reuse_rates import ReuseRates

TOKEN_BYTES = 4  # int32


class RadixNode:
    """A run of whole pages. A root has no parent and no pages."""

    __slots__ = (
        "children",
        "idle_since",
        "key",
        "last_use",
        "locks",
        "namespace",
        "num_uses",
        "pages",
        "parent",
        "queue",
    )

    def __init__(self, parent: "RadixNode | None", namespace: str, key: bytearray, pages: Pages):
        self.parent = parent
        self.namespace = namespace
        self.key = key
        self.pages = pages
        self.children: dict[bytes, RadixNode] = {}  # by the bytes of their first page
        self.locks = 0  # requests that use this node or one below it
        self.last_use = 0  # the clock's time when it was last unlocked
        self.idle_since = 0  # the step in which that was
        self.num_uses = 0  # by requests that found it here
        self.queue = NOT_QUEUED  # where it is in the `LeafOrder`

    @property
    def is_evictable(self) -> bool:
        return not self.locks and not self.children and self.parent is not None


class Match(NamedTuple):
    """The longest known prefix of some tokens."""

    node: RadixNode | None  # the last node that took part; None if the namespace is unknown
    node_pages: int  # how many of its pages match
    pages: Pages  # of the whole prefix
    num_tokens: int


class Inserted(NamedTuple):
    """What became of pages that were inserted."""

    node: RadixNode  # where they end; the caller's lock is here now
    known_pages: Pages  # the tree's own pages of the tokens that it knew already, leading ones
    newly_locked: Pages  # those of the known pages that nobody had locked


class RadixCache:
    """The tree. Enters its unlocked leaves into `order`; whoever finds one there calls `evict`.

    Tells `reuse` what became idle and what was found again, evicted or not.
    """

    def __init__(
        self, *, page_tokens: int, order: LeafOrder[RadixNode], clock: Clock, reuse: ReuseRates
    ):
        self._page_bytes = page_tokens * TOKEN_BYTES
        self._page_tokens = page_tokens
        self._order = order
        self._clock = clock
        self._reuse = reuse
        self._ghosts = GhostPrefixes(page_bytes=self._page_bytes)
        self._roots: dict[str, RadixNode] = {}
        self.cached_pages = 0  # of unlocked nodes
        self.locked_pages = 0

    def match(self, tokens: bytes, namespace: str) -> Match:
        """The longest prefix of `tokens`, in whole pages, that the tree knows. Changes nothing."""
        root = self._roots.get(namespace)
        if root is None:
            return Match(None, 0, no_pages(), 0)
        return self._descend(root, tokens)

    def lock(self, match: Match, namespace: str) -> tuple[RadixNode, Pages]:
        """Lock a fresh match of `namespace`; returns the node to unlock later and the pages that
        nobody had locked."""
        node = match.node
        if node is None:
            node = RadixNode(None, namespace, bytearray(), no_pages())
            self._roots[namespace] = node
        node = self._split(node, match.node_pages)
        newly_locked = self._lock_path(node, above=None)
        path: RadixNode | None = node
        while path is not None:
            path.num_uses += 1
            path = path.parent
        return node, newly_locked

    def unlock(self, node: RadixNode) -> Pages:
        """Undo a lock; returns the pages that nobody has locked any more. The whole path counts as
        used now."""
        unlocked = no_pages()
        path: RadixNode | None = node
        while path is not None:
            path.locks -= 1
            path.last_use = self._clock.now
            if not path.locks:
                unlocked += path.pages
                path.idle_since = self._reuse.step
                self._reuse.idle(path.num_uses, len(path.pages))
            root, path = path, path.parent
        self.locked_pages -= len(unlocked)
        self.cached_pages += len(unlocked)
        self._order.add(node)
        self._drop_root_if_empty(root)
        return unlocked

    def recall(self, tokens: bytes, num_bytes: int, namespace: str) -> int:
        """How many pages behind the first `num_bytes` of `tokens` would match if they had not been
        evicted. Counts them as found again, once."""
        num_pages = 0
        for ghost in self._ghosts.recall(crc32(namespace.encode()), tokens, num_bytes):
            self._reuse.reuse(ghost.num_uses, ghost.idle_since, ghost.num_pages)
            num_pages += ghost.num_pages
        return num_pages

    def forget(self) -> None:
        """Forget what is not cached any more."""
        self._ghosts.clear()

    def insert(self, node: RadixNode, tokens: bytes, pages: Pages) -> Inserted:
        """Add the pages of the tokens that follow `node`, on which the caller has a lock; the lock
        moves along.

        The caller keeps those of its pages that double `known_pages`; the others belong to the tree
        now, locked.
        """
        assert len(tokens) == len(pages) * self._page_bytes, "tokens and pages differ in length"
        match = self._descend(node, tokens)
        assert match.node is not None
        end = self._split(match.node, match.node_pages)
        newly_locked = self._lock_path(end, above=node)
        num_known = len(match.pages)
        if num_known < len(pages):
            key = bytearray(tokens[num_known * self._page_bytes :])
            end = self._append(end, key, pages[num_known:])
        return Inserted(end, match.pages, newly_locked)

    def evict(self, leaf: RadixNode, num_pages: int) -> Pages:
        """Forget the last `num_pages` pages of an unlocked leaf; if that is all, its parent may be
        the next leaf."""
        assert leaf.is_evictable, "only unlocked leaves are evicted"
        assert leaf.parent is not None
        num_kept = max(0, len(leaf.pages) - num_pages)
        self._ghosts.remember(
            path_checksum(leaf, num_kept * self._page_bytes),
            leaf.key[num_kept * self._page_bytes :],
            num_uses=leaf.num_uses,
            idle_since=leaf.idle_since,
        )
        pages = leaf.pages[num_kept:]
        self.cached_pages -= len(pages)
        if num_kept:
            del leaf.pages[num_kept:]
            del leaf.key[num_kept * self._page_bytes :]
        else:
            parent = leaf.parent
            del parent.children[self._first_page(leaf.key)]
            leaf.parent = None
            self._order.add(parent)
            self._drop_root_if_empty(parent)
        return pages

    def nodes(self) -> Iterator[RadixNode]:
        """Every node, roots first."""
        pending = list(self._roots.values())
        while pending:
            node = pending.pop()
            yield node
            pending.extend(node.children.values())

    def violations(self, locks: Iterable[RadixNode]) -> list[str]:
        """`locks`: the node of each lock that is held."""
        paths: Counter[RadixNode] = Counter()
        for node in locks:
            path: RadixNode | None = node
            while path is not None:
                paths[path] += 1
                path = path.parent
        found = [text for node in self.nodes() for text in self._node_violations(node)]
        if any(node.locks != paths[node] for node in self.nodes()) or paths.keys() - set(
            self.nodes()
        ):
            found.append("the locks of the tree are not those of the running requests")
        locked = sum(len(node.pages) for node in self.nodes() if node.locks)
        cached = sum(len(node.pages) for node in self.nodes() if not node.locks)
        if (locked, cached) != (self.locked_pages, self.cached_pages):
            found.append(f"locked and cached pages are counted wrong, they are {locked}, {cached}")
        return found + self._order.violations({node for node in self.nodes() if node.is_evictable})

    def _node_violations(self, node: RadixNode) -> Iterator[str]:
        if len(node.key) != len(node.pages) * self._page_bytes:
            yield "a node's key is not as long as its pages"
        if node.parent is None and not (node.locks or node.children):
            yield f"the empty root of namespace {node.namespace!r} was not dropped"
        if node.parent is not None and not node.pages:
            yield "a node has no pages"
        for first_page, child in node.children.items():
            if child.parent is not node or self._first_page(child.key) != first_page:
                yield "a child is not where its parent looks for it"

    def _descend(self, node: RadixNode, tokens: bytes) -> Match:
        """Follow whole pages of `tokens` down from `node`."""
        pages = no_pages()
        node_pages = len(node.pages)
        start = 0
        while start < len(tokens):
            child = node.children.get(tokens[start : start + self._page_bytes])
            if child is None:
                break
            node = child
            if tokens.startswith(node.key, start):
                node_pages = len(node.pages)
                pages += node.pages
                start += len(node.key)
                continue
            node_pages = self._common_pages(node.key, tokens, start)
            pages += node.pages[:node_pages]
            break
        return Match(node, node_pages, pages, len(pages) * self._page_tokens)

    def _common_pages(self, key: bytearray, tokens: bytes, start: int) -> int:
        num_tokens = min(len(key), len(tokens) - start) // TOKEN_BYTES
        ours = np.frombuffer(key, np.int32, num_tokens)
        theirs = np.frombuffer(tokens, np.int32, num_tokens, start)
        differs = ours != theirs
        num_common = int(differs.argmax()) if differs.any() else num_tokens
        return num_common // self._page_tokens

    def _split(self, node: RadixNode, num_pages: int) -> RadixNode:
        """Make a node end after `num_pages` of its pages; returns that upper part. `node` stays the
        lower part, so that whoever has locked it needs not know."""
        if num_pages == len(node.pages):
            return node
        assert node.parent is not None
        cut = num_pages * self._page_bytes
        upper = RadixNode(node.parent, node.namespace, node.key[:cut], node.pages[:num_pages])
        upper.locks = node.locks
        upper.num_uses = node.num_uses
        upper.last_use, upper.idle_since = node.last_use, node.idle_since
        node.parent.children[self._first_page(upper.key)] = upper
        del node.key[:cut]
        del node.pages[:num_pages]
        node.parent = upper
        upper.children[self._first_page(node.key)] = node
        return upper

    def _lock_path(self, node: RadixNode, *, above: RadixNode | None) -> Pages:
        """Lock from `node` up to, without, `above`; the pages that nobody had locked."""
        newly_locked = no_pages()
        path: RadixNode | None = node
        while path is not above:
            assert path is not None
            if not path.locks:
                newly_locked += path.pages
                self._reuse.reuse(path.num_uses, path.idle_since, len(path.pages))
            path.locks += 1
            path = path.parent
        self.locked_pages += len(newly_locked)
        self.cached_pages -= len(newly_locked)
        return newly_locked

    def _append(self, node: RadixNode, key: bytearray, pages: Pages) -> RadixNode:
        """Put new pages, locked once, behind a node that the caller has locked: in it if it's all
        the caller's."""
        self.locked_pages += len(pages)
        if node.parent is not None and node.locks == 1 and not node.children:
            node.key += key
            node.pages += pages
            return node
        child = RadixNode(node, node.namespace, key, pages)
        child.locks = 1
        node.children[self._first_page(key)] = child
        return child

    def _first_page(self, key: bytearray) -> bytes:
        return bytes(key[: self._page_bytes])

    def _drop_root_if_empty(self, root: RadixNode) -> None:
        """Namespaces come from requests: an unused one must not stay for ever."""
        if root.parent is None and not root.locks and not root.children:
            del self._roots[root.namespace]


def path_checksum(node: RadixNode, num_bytes: int) -> int:
    """Of the namespace, all tokens above the node and the first `num_bytes` of its own."""
    path, above = [memoryview(node.key)[:num_bytes]], node.parent
    while above is not None:
        path.append(memoryview(above.key))
        above = above.parent
    checksum = crc32(node.namespace.encode())
    for key in reversed(path):
        checksum = crc32(key, checksum)
    return checksum


def path_pages(node: RadixNode) -> Pages:
    """The pages from the root to `node`."""
    runs = []
    path: RadixNode | None = node
    while path is not None:
        runs.append(path.pages)
        path = path.parent
    pages = no_pages()
    for run in reversed(runs):
        pages += run
    return pages
