"""Why a request ends without its answer, in words for people: what happened, and what to change."""

from sglmoe.protocol import Limits, MemorySnapshot
from sglmoe.scheduler.finish import FinishReason, aborted
from sglmoe.scheduler.request import Request
from sglmoe.units import ceil_div


def never_fits(request: Request, snapshot: MemorySnapshot) -> FinishReason:
    """Memory was refused to it while nothing else ran."""
    pages = ceil_div(request.num_tokens, snapshot.page_tokens)
    return aborted(
        f"The request's {request.num_tokens} tokens take {pages} KV pages, but only "
        f"{snapshot.available_pages} are available although nothing else runs. Raise --memory-budget.",
        503,
    )


def no_longer_fits(request: Request, limits: Limits) -> FinishReason | None:
    """Why a new worker can't serve what the last one could; None if it can."""
    wanted = len(request.prompt_ids) + request.stop.max_new_tokens
    if wanted <= limits.total_tokens:
        return None
    return aborted(
        f"The request's prompt and max_new_tokens come to {wanted} tokens, but the worker had to be replaced, and KV memory "
        f"of the new one holds {limits.total_tokens}. Free memory on the machine, or raise --memory-budget.",
        503,
    )


def fatal(request: Request, cause: str) -> FinishReason:
    """Workers die of it."""
    return aborted(
        f"The worker died {request.num_deaths} times in a row while it was at work for this request, the last time for it "
        f"alone. The request is given up; others go on. The last time: {cause}",
        500,
    )
