"""What steps and workers came to, in numbers for logs and metrics."""

from collections.abc import Sequence

import msgspec

from sglmoe.protocol import MemorySnapshot, RowResult, StepResult
from sglmoe.scheduler.request import Request


class StepReport(msgspec.Struct, frozen=True):
    """One answered step. Tokens are those of requests that were still wanted."""

    snapshot: MemorySnapshot
    step_seconds: float
    num_admitted: int
    prefill_tokens: int
    cached_tokens: int
    decode_tokens: int
    num_rejected: int = 0
    num_preempted: int = 0  # of these, requests that lost KV they had computed
    rejected_input_tokens: int = 0
    rejected_output_tokens: int = 0


class Totals(msgspec.Struct):
    """Counts since the scheduler started, which outlives its workers."""

    decoded_tokens: int = 0  # by decode steps: all output but first tokens
    prompt_tokens: int = 0  # computed; not those that were found in the cache
    step_seconds: float = 0.0  # that steps took
    rejected_requests: int = 0  # times that a request found no memory and went back to the queue
    preempted_requests: int = 0  # of these, times that it lost KV it had computed

    def count(self, report: StepReport) -> None:
        self.decoded_tokens += report.decode_tokens
        self.prompt_tokens += report.prefill_tokens
        self.step_seconds += report.step_seconds
        self.rejected_requests += report.num_rejected
        self.preempted_requests += report.num_preempted


class Restarts(msgspec.Struct, frozen=True):
    """How often the worker was replaced. The cause and the times, from the loss on, are of the last one; 0 is "not yet"."""

    count: int = 0
    failed_requests: int = 0  # that worker after worker died with
    cause: str = ""
    ready_seconds: float = 0.0  # until the new worker could serve
    token_seconds: float = 0.0  # until its first token


class RowTally(msgspec.Struct, frozen=True, gc=False):
    """Tokens that one row stands for."""

    num_admitted: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    decode_tokens: int = 0


ONE_DECODED = RowTally(decode_tokens=1)


def tally_row(request: Request, row: RowResult) -> RowTally:
    """To be called before `request` takes the row in."""
    start = request.num_computed or row.num_cached
    num_new = row.num_computed - start
    if request.output_ids and num_new == 1:
        return ONE_DECODED
    if request.num_computed:
        return RowTally(prefill_tokens=num_new)
    return RowTally(num_admitted=1, prefill_tokens=num_new, cached_tokens=row.num_cached)


def summarize(
    result: StepResult, tallies: Sequence[RowTally], rejected: Sequence[Request]
) -> StepReport:
    """The report on `result`, whose wanted rows came to `tallies`; `rejected` as they were before it."""
    prefills = [tally for tally in tallies if tally is not ONE_DECODED]
    return StepReport(
        snapshot=result.snapshot,
        step_seconds=result.step_seconds,
        num_admitted=sum(tally.num_admitted for tally in prefills),
        prefill_tokens=sum(tally.prefill_tokens for tally in prefills),
        cached_tokens=sum(tally.cached_tokens for tally in prefills),
        decode_tokens=len(tallies) - len(prefills),
        num_rejected=len(rejected),
        num_preempted=sum(request.num_computed > 0 for request in rejected),
        rejected_input_tokens=sum(len(request.prompt_ids) for request in rejected),
        rejected_output_tokens=sum(len(request.output_ids) for request in rejected),
    )
