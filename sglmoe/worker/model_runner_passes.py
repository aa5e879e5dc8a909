"""A decode step out of a graph whose tokens nobody waits for yet.

One of the files that know sglang.
"""

from collections.abc import Sequence
from typing import Any

import torch

from sglmoe.worker.captured_steps import CapturedSteps
from sglmoe.worker.copies import ToHost
from sglmoe.worker.request import BatchRow
from sglmoe.worker.sampling import SamplingGroup
from sglmoe.worker.seams import Pass, RowOutput


class ReplayedPass(Pass):
    """Queued with all that it samples, which nothing but tokens is asked of (`is_plain`); frames are lent to it until its
    outputs are asked for."""

    def __init__(
        self,
        rows: Sequence[BatchRow],
        order: Sequence[BatchRow],
        *,
        group: SamplingGroup,
        token_ids: torch.Tensor,
        steps: CapturedSteps,
    ):
        """`rows`: as they were asked for; `order`: as they lie in the batch. `token_ids`: int `[rows]`, on the device, in that
        order."""
        self._rows = rows
        self._places = {row.request.rid: place for place, row in enumerate(order)}
        self.steps = steps
        self._tokens = ToHost(token_ids)
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
        self.steps.take_back(goes_on=is_followed)
        return [RowOutput(token_id=token_ids[self._places[row.request.rid]]) for row in self._rows]


def is_plain(batch: Any, rows: Sequence[BatchRow], group: SamplingGroup) -> bool:
    """Whether all that is asked of the decode step is a token of each row, which no other word of the host's decides."""
    return (
        len(group.requests) == len(rows)
        and not batch.return_logprob
        and group.info.grammars is None
        and not group.info.penalizer_orchestrator.is_required
        and all(row.request.next_routed is None for row in rows)
    )
