"""The routing path predictor's decoder, a token at a time for many requests of different lengths."""

from heapq import heappop, heappush

import torch
from torch import Tensor

from sglmoe.prediction.routing_path_model import RoutingPathModel, absent


class IncrementalDecoder:
    """Gives what `RoutingPathModel.decode` gives at a token's place, from keys and values of those before.

    Each request has a row. All calls inside `torch.inference_mode`.
    """

    def __init__(self, model: RoutingPathModel):
        its = model.dimensions
        self._model = model
        self._window_tokens = its.window_tokens
        # Of each block, keys and values [rows, heads, tokens, d_kv]. The token generated after
        # c others is at place c modulo `window_tokens`.
        prompt, generated = (
            (0, its.num_heads, num_tokens, its.d_kv)
            for num_tokens in (its.prompt_tokens, its.window_tokens)
        )
        self._prompts = [(torch.empty(prompt), torch.empty(prompt)) for _ in model.decoder]
        self._generated = [(torch.empty(generated), torch.empty(generated)) for _ in model.decoder]
        self._prompt_lengths = torch.empty(0, dtype=torch.int64)  # [rows]
        self._num_generated = torch.empty(0, dtype=torch.int64)  # [rows]
        self._bias_by_age = model.decoder_bias(torch.arange(its.window_tokens))
        self._free: list[int] = []  # a heap: rows in use stay together

    @property
    def num_rows(self) -> int:
        return len(self._num_generated)

    def take(self) -> int:
        """A row, for `begin`."""
        if not self._free:
            self._grow(max(4, self.num_rows))
        return heappop(self._free)

    def give_back(self, row: int) -> None:
        heappush(self._free, row)

    def begin(self, row: int, prompt_states: Tensor) -> None:
        """Nothing is generated yet after a prompt of these states [P, d_model]."""
        length = len(prompt_states)
        for block, cached in zip(self._model.decoder, self._prompts, strict=True):
            new = block.cross_attention.keys_and_values(prompt_states[None])
            for tensor, its in zip(cached, new, strict=True):
                tensor[row, :, :length] = its[0]
        self._prompt_lengths[row] = length
        self._num_generated[row] = 0

    def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """States [B, d_model] of the next token of each of B rows in ascending order; both int64 [B]."""
        counts, lengths = self._num_generated[rows], self._prompt_lengths[rows]
        places, bias = counts % self._window_tokens, self._bias(counts)
        prompt_bias = absent(lengths, int(lengths.max()))
        x = self._model.embedding(tokens)[:, None]
        for block, own, prompt in zip(
            self._model.decoder, self._generated, self._prompts, strict=True
        ):
            normed = block.norm(x)
            for tensor, new in zip(own, block.attention.keys_and_values(normed), strict=True):
                tensor[rows, :, places] = new[:, :, 0]
            seen = [first(tensor, rows, bias.shape[3]) for tensor in own]
            x = x + block.attention(normed, *seen, bias)
            read = [first(tensor, rows, prompt_bias.shape[3]) for tensor in prompt]
            x = x + block.cross_attention(block.cross_norm(x), *read, prompt_bias)
            x = block.feed_forward(x)
        self._num_generated[rows] = counts + 1
        states: Tensor = self._model.decoder_norm(x)[:, 0]
        return states

    def _bias(self, counts: Tensor) -> Tensor:
        """[B, heads, 1, places], -inf where a place has nothing of this request yet."""
        num_seen = min(int(counts.max()) + 1, self._window_tokens)
        ages = (counts[:, None] - torch.arange(num_seen)) % self._window_tokens
        bias = self._bias_by_age[:, ages].masked_fill(ages > counts[:, None], -torch.inf)
        return bias.transpose(0, 1)[:, :, None]

    def _grow(self, num_more: int) -> None:
        num_rows = self.num_rows
        for cached in (self._prompts, self._generated):
            cached[:] = [(extended(k, num_more), extended(v, num_more)) for k, v in cached]
        self._prompt_lengths = extended(self._prompt_lengths, num_more)
        self._num_generated = extended(self._num_generated, num_more)
        for row in range(num_rows, num_rows + num_more):
            heappush(self._free, row)


def first(cached: Tensor, rows: Tensor, num_tokens: int) -> Tensor:
    """[B, heads, num_tokens, d_kv]: without copying where the rows lie side by side."""
    start, stop = int(rows[0]), int(rows[-1]) + 1
    if stop - start == len(rows):
        return cached[start:stop, :, :num_tokens]
    return cached[rows, :, :num_tokens]


def extended(tensor: Tensor, num_more: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(num_more, *tensor.shape[1:])])
