"""Counting the tokens a model spends on reasoning, as SGLang's `Req.update_reasoning_tokens` counts them."""

from collections.abc import Sequence


class ReasoningCounter:
    """Counts output tokens up to and including the marker that ends the reasoning.

    With `start_ids` the model opens the reasoning itself: an output that does not begin with them has none.
    """

    def __init__(self, *, end_ids: Sequence[int], start_ids: Sequence[int] = ()) -> None:
        self.num_tokens = 0
        self._start_ids = tuple(start_ids)
        self._end_ids = tuple(end_ids)
        self._num_started = 0
        self._recent: tuple[int, ...] = ()
        self._over = not end_ids

    def count(self, token_id: int) -> None:
        if self._over:
            return
        if self._num_started < len(self._start_ids):
            self._count_start(token_id)
            return
        self.num_tokens += 1
        self._recent = (*self._recent, token_id)[-len(self._end_ids) :]
        self._over = self._recent == self._end_ids

    def _count_start(self, token_id: int) -> None:
        if token_id != self._start_ids[self._num_started]:
            self._over = True
            return
        self._num_started += 1
        if self._num_started == len(self._start_ids):
            self.num_tokens += self._num_started
