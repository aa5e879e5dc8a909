"""SIGTERM within a limit: requests that have not finished by then are handed back with the tokens they have.

One of the files that know sglang, which by itself waits for them however long they take.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.entrypoints.engine import init_tokenizer_manager
from sglang.srt.managers.tokenizer_manager import SignalHandler

logger = logging.getLogger(__name__)

# Arbitrary: how long those have that come in after the limit.
REPEAT_SECONDS = 1.0


def with_limit(limit_seconds: float) -> Callable[..., Any]:
    """What sglang makes its tokenizer manager with, where the time from SIGTERM to the last answer is limited."""

    def init(*args: Any, **keywords: Any) -> Any:
        tokenizer_manager, template_manager = init_tokenizer_manager(*args, **keywords)
        tokenizer_manager.signal_handler_class = lambda manager: LimitedStop(manager, limit_seconds)
        return tokenizer_manager, template_manager

    return init


class LimitedStop(SignalHandler):
    """Lets requests finish, as sglang does, and after `limit_seconds` aborts those that are left."""

    def __init__(self, tokenizer_manager: Any, limit_seconds: float) -> None:
        super().__init__(tokenizer_manager)
        self._limit_seconds = limit_seconds

    def sigterm_handler(self, signum: Any = None, frame: Any = None) -> None:
        super().sigterm_handler(signum, frame)
        asyncio.get_running_loop().call_later(self._limit_seconds, self._hand_back)

    def _hand_back(self) -> None:
        if num_left := len(self.tokenizer_manager.rid_to_state):
            logger.warning(
                "%d requests did not finish within --shutdown-timeout of %g s; they are handed back as they are",
                num_left,
                self._limit_seconds,
            )
            self.tokenizer_manager.abort_request(abort_all=True)
        asyncio.get_running_loop().call_later(REPEAT_SECONDS, self._hand_back)
