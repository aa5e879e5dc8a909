"""What a step of the worker meets: the model, which has tensors, and memory, as it sees them."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec
import numpy as np

from sglmoe.protocol import MemorySnapshot, RoutedExperts, TokenLogprobs
from sglmoe.worker.request import BatchRow


class RowOutput(msgspec.Struct, frozen=True):
    """What the model says of one row."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    routed_experts: RoutedExperts | None = None
    grammar_done: bool = False
    error: str = ""


class Pass(Protocol):
    """A forward pass that has begun."""

    @property
    def is_over(self) -> bool:
        """Whether its outputs can be had without waiting."""

    @property
    def may_be_followed(self) -> bool:
        """Whether the next decode step of the same rows may begin before its outputs are asked for."""

    def outputs(self, *, is_followed: bool) -> list[RowOutput]:
        """One a row, in their order. To be asked for once; `is_followed`: another pass has begun behind this one."""


class Done(Pass):
    """A pass that was computed as soon as it began."""

    is_over = True
    may_be_followed = False

    def __init__(self, outputs: list[RowOutput]):
        self._outputs = outputs

    def outputs(self, *, is_followed: bool) -> list[RowOutput]:
        assert not is_followed
        return self._outputs


class Model(Protocol):
    """The seam to tensors: everything here happens on the device and in sglang."""

    @property
    def num_behind(self) -> int:
        """How many steps are likely to follow one in which all rows decode. They need pages that are at hand."""

    def write_token_ids(self, table_row: int, start: int, token_ids: np.ndarray) -> None:
        """Set `req_to_token[table_row, start:]` to the KV ids of these positions."""

    def write_decode_ids(
        self, table_rows: Sequence[int], positions: Sequence[int], token_ids: Sequence[int]
    ) -> None:
        """Set one position in each of several rows."""

    def begin(self, rows: Sequence[BatchRow]) -> Pass:
        """Compute the rows and sample where one is complete. Raises ExpertReadError, and nothing of it counts."""

    def follow(self, rows: Sequence[BatchRow], before: Pass) -> Pass:
        """Begin the next decode step of the rows of `before`, which may be followed: tokens that it has sampled are what these
        compute, whether they are known yet or not."""

    def forget(self, rid: str) -> None:
        """Let go of a request's sampling state."""


class Memory(Protocol):
    """The seam to memory: the part of `MemoryManager` that a step needs."""

    def probe(self, tokens: bytes, namespace: str) -> int: ...

    def admit(
        self, rid: str, tokens: bytes, namespace: str, *, max_cached_tokens: int | None = None
    ) -> int: ...

    def extend(self, rid: str, num_tokens: int) -> bool: ...

    def has_pages(self, wanted: Iterable[tuple[str, int]]) -> bool: ...

    def token_id(self, rid: str, position: int) -> int: ...

    def token_ids(self, rid: str, start: int, stop: int) -> np.ndarray: ...

    def commit(self, rid: str, tokens: bytes, num_computed: int) -> bool: ...

    def release(self, rid: str, tokens: bytes, num_computed: int) -> None: ...

    def begin_step(self, num_tokens: int = 1) -> None: ...

    def set_prices(self, *, expert_nanoseconds: int, token_nanoseconds: int) -> None: ...

    def flush_cache(self) -> None: ...

    def snapshot(self, step_id: int) -> MemorySnapshot: ...
