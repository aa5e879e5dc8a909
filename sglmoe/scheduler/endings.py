"""Why a request ends without its answer, with the numbers of its case."""

from sglmoe.errors import requests
from sglmoe.protocol import Limits, MemorySnapshot
from sglmoe.scheduler.finish import FinishReason, failed
from sglmoe.scheduler.request import Request
from sglmoe.units import ceil_div


def never_fits(request: Request, snapshot: MemorySnapshot) -> FinishReason:
    """Memory was refused to it while nothing else ran."""
    pages = ceil_div(request.num_tokens, snapshot.page_tokens)
    return failed(
        requests.never_fits(
            num_tokens=request.num_tokens,
            num_pages=pages,
            available_pages=snapshot.available_pages,
        )
    )


def no_longer_fits(request: Request, limits: Limits) -> FinishReason | None:
    """Why a new worker can't serve what the last one could; None if it can."""
    wanted = len(request.prompt_ids) + request.stop.max_new_tokens
    if wanted <= limits.total_tokens:
        return None
    return failed(requests.no_longer_fits(num_tokens=wanted, kv_tokens=limits.total_tokens))


def fatal(request: Request, cause: str) -> FinishReason:
    """Workers die of it."""
    return failed(requests.fatal(num_deaths=request.num_deaths, cause=cause))
