"""Refusals in SGLang's own words: clients that know SGLang match on them. Nothing of ours is added."""

from sglmoe.errors.user_error import UserError

ABORTED = "Aborted"
QUEUE_FULL = "The request queue is full."
MORE_IMPORTANT = "The request is aborted by a higher priority request."
PRIORITIES_OFF = (
    "Using priority is disabled for this server. Please send a new request without a priority."
)
WAITED_TOO_LONG = "Request waiting timeout reached."
RAN_TOO_LONG = "Request running timeout reached."


def as_sglang_says(error: ValueError) -> UserError:
    """A refusal by a part of SGLang that we call."""
    return error if isinstance(error, UserError) else UserError(str(error))
