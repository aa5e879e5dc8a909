"""A decode step out of a graph whose tokens nobody waits for yet.

One of the files that know sglang.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from sglmoe.memory.small_copies import ToHost
from sglmoe.protocol import TokenLogprobs
from sglmoe.worker.captured_steps import CapturedSteps
from sglmoe.worker.model_runner_logprobs import output_logprobs
from sglmoe.worker.request import BatchRow
from sglmoe.worker.sampling import SamplingGroup
from sglmoe.worker.seams import Pass, RowOutput


class ReplayedPass(Pass):
    """Queued with its sampling, where nothing is asked of it beyond what `is_plain` grants; frames are lent to it until its
    outputs are asked for."""

    def __init__(
        self,
        rows: Sequence[BatchRow],
        order: Sequence[BatchRow],
        *,
        group: SamplingGroup,
        token_ids: torch.Tensor,
        logprobs: torch.Tensor | None,
        steps: CapturedSteps,
    ):
        """`rows`: as they were asked for; `order`: as they lie in the batch. In that order, on the device: `token_ids`, int
        `[rows]`, and their `logprobs`, if any row wants them, float `[rows]`."""
        self._rows = rows
        self._order = order
        self._places = {row.request.rid: place for place, row in enumerate(order)}
        self.steps = steps
        self._logprobs = None if logprobs is None else ToHost(logprobs)
        self._tokens = ToHost(token_ids)  # behind these
        self.group = group
        self.token_ids = token_ids

    @property
    def is_over(self) -> bool:
        return self._tokens.is_there

    @property
    def may_be_followed(self) -> bool:
        return self.steps.may_go_on

    def in_order(self, rows: Sequence[BatchRow]) -> list[BatchRow]:
        """Rows of the same requests as they lie in the batch."""
        return sorted(rows, key=lambda row: self._places[row.request.rid])

    def outputs(self, *, is_followed: bool) -> list[RowOutput]:
        token_ids = self._tokens.wait().tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        if self._logprobs is not None:
            output = SimpleNamespace(next_token_logprobs=self._logprobs.wait())
            logprobs = output_logprobs(output, self._order, token_ids)
        self.steps.take_back(goes_on=is_followed)
        outputs = [RowOutput(*its) for its in zip(token_ids, logprobs, strict=True)]
        return [outputs[self._places[row.request.rid]] for row in self._rows]


def is_plain(rows: Sequence[BatchRow], group: SamplingGroup) -> bool:
    """Whether a token of each row, and its own log probability, is all that is asked of the decode step, and no word of the
    host's decides which token that is."""
    specs = [row.request.spec.logprobs for row in rows]
    return (
        len(group.requests) == len(rows)
        and not any(spec.num_top or spec.token_ids for spec in specs if spec)
        and group.info.grammars is None
        and not group.info.penalizer_orchestrator.is_required
        and all(row.request.next_routed is None for row in rows)
    )
