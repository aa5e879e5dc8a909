"""What was predicted when a request last had the same few tokens behind it."""

from collections import OrderedDict
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sglmoe.prediction.predictor import StepTokens

Floats = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int32]

UNKNOWN_TOKEN = -1


class TokenWindows:
    """The last `num_tokens` token ids of every request, as far as steps have shown them."""

    def __init__(self, num_tokens: int):
        self._num_before = num_tokens - 1
        self._ends: dict[int, tuple[int, TokenIds]] = {}  # owner -> next position, tokens before it

    def extend(self, tokens: StepTokens) -> TokenIds:
        """[T, num_tokens]: each of the step's tokens with those before it in its request, itself last."""
        starts = np.flatnonzero(np.diff(tokens.owners, prepend=-1)).tolist()
        rows = [self._extend(tokens, *bounds) for bounds in pairwise([*starts, tokens.num_tokens])]
        return np.concatenate(rows)

    def forget(self, owner: int) -> None:
        self._ends.pop(owner, None)

    def _extend(self, tokens: StepTokens, start: int, stop: int) -> TokenIds:
        owner, position = int(tokens.owners[start]), int(tokens.positions[start])
        next_position, before = self._ends.get(owner, (-1, None))
        if before is None or position != next_position:
            before = np.full(self._num_before, UNKNOWN_TOKEN, np.int32)
        line = np.concatenate([before, tokens.token_ids[start:stop]])
        self._ends[owner] = position + stop - start, line[len(line) - self._num_before :]
        return np.lib.stride_tricks.sliding_window_view(line, self._num_before + 1)


class PredictionCache:
    """Predictions by window of tokens and layer; of too many, those used longest ago are dropped."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._entries: OrderedDict[tuple[int, bytes], Floats] = OrderedDict()
        self.num_hits = 0
        self.num_misses = 0

    def get(self, layer: int, window: bytes) -> Floats | None:
        entry = self._entries.get((layer, window))
        if entry is None:
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._entries.move_to_end((layer, window))
        return entry

    def put(self, layer: int, window: bytes, prediction: Floats) -> None:
        self._entries[layer, window] = prediction
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
