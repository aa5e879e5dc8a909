"""Rules to compare with the product's: which pages a request gets, and which are evicted for it.

"oldest" is how it began. The next three change only where pages go, after a request's own frame; "now" is the product.
"""

from itertools import takewhile

from sglmoe.memory.evictor import Evictor
from sglmoe.memory.kv_pages import PagePool, Pages
from sglmoe.memory.radix_cache import RadixNode


class OldestFirst(PagePool):
    """The partly used frame that has been so longest, for everybody."""

    def allocate(self, num_pages: int, *, after: int | None = None) -> Pages:
        return super().allocate(num_pages)

    def _next_frame(self, num_pages: int) -> int:
        return next(iter(self._free)) if self._free else self._open_frame()


class BestFit(PagePool):
    """The fullest of the partly used frames."""

    def _next_frame(self, num_pages: int) -> int:
        if not self._free:
            return self._open_frame()
        return min(self._free, key=lambda frame: len(self._free[frame]))


class WorstFit(PagePool):
    """The roomiest of the partly used frames."""

    def _next_frame(self, num_pages: int) -> int:
        return super()._next_frame(0)


class PlainEviction(Evictor):
    """Pages of the first leaf in the order, wherever they lie."""

    def _evict_near(
        self, leaf: RadixNode, num_pages: int, page: int | None, *, below: float
    ) -> None:
        self.evict_leaf(leaf, num_pages)

    def _empty_frame(self, *, below: float) -> None:
        leaf = self._leaves.first()
        assert leaf is not None
        frames = [page // self._pages_per_frame for page in reversed(leaf.pages)]
        num_pages = sum(1 for _ in takewhile(lambda frame: frame == frames[0], frames))
        self.evict_leaf(leaf, num_pages)


RULES: dict[str, tuple[type[PagePool], type[Evictor]]] = {
    "oldest": (OldestFirst, PlainEviction),
    "best fit": (BestFit, PlainEviction),
    "worst fit": (WorstFit, PlainEviction),
    "new or worst fit": (PagePool, PlainEviction),
    "now": (PagePool, Evictor),
}
