"""What a pass over prompts should hold, and whether it should wait to hold more. Pure functions.

With experts streamed, a pass has a price whatever it computes: the experts that it loads. It is paid once for all prompts in
it. How long to collect them is Harris's question (How many parts to make at once, 1913): holding costs most and setting
up costs most when either costs as much as the other.
"""

import math

import msgspec

from sglmoe.protocol import StepCosts

# Arbitrary: where nothing is computed while experts come, a pass is full when it computes for so many times as long as it
# loads: then loading takes a fifth of it. Where it is hidden, computing for as long is enough.
UNHIDDEN_RATIO = 4.0
# Arbitrary: prompts wait for others no longer than so many times what the experts of a pass take to come.
MOST_STREAMS = 4.0
UNBOUNDED = 1 << 30


class PassSettings(msgspec.Struct, frozen=True):
    """`--fill-passes`, `--ttft-target` and `--itl-target`. Targets of None bound nothing."""

    fill: bool = False
    ttft_seconds: float | None = None
    itl_seconds: float | None = None


class Held(msgspec.Struct, frozen=True):
    """For how long prompts that could have been computed have waited for others."""

    seconds: float = 0.0  # the first of them
    request_seconds: float = 0.0  # all of them


class Pass(msgspec.Struct, frozen=True):
    """The pass over prompts that the next step could be."""

    num_tokens: int
    num_decoding: int  # requests that would decode instead
    waited_seconds: tuple[float, ...]  # for each of its requests, since it came


def pass_tokens(
    configured: int, most: int, *, costs: StepCosts, settings: PassSettings, num_decoding: int
) -> int:
    """Tokens of prompts that a step may compute: as configured, up to `most` where that fills it, and fewer where the time
    between tokens of those who decode asks for it. A target that the experts alone break makes no pass less than half full.
    """
    tokens = configured
    if settings.fill:
        within = _tokens_within(settings.ttft_seconds, costs)
        tokens = max(tokens, min(full_tokens(costs), within, most))
    if num_decoding:
        within = _tokens_within(settings.itl_seconds, costs)
        tokens = min(tokens, max(within, _covering_tokens(costs)))
    return tokens


def full_tokens(costs: StepCosts) -> int:
    """Tokens from which on a pass hardly gets cheaper for each; 0 where it loads nothing."""
    ratio = 1.0 if costs.loads_overlap else UNHIDDEN_RATIO
    return math.ceil(ratio * _covering_tokens(costs))


def pass_seconds(num_tokens: int, costs: StepCosts) -> float:
    compute_seconds = costs.token_seconds * num_tokens
    if costs.loads_overlap:
        return max(costs.stream_seconds, compute_seconds)
    return costs.stream_seconds + compute_seconds


def should_wait(ready: Pass, *, costs: StepCosts, held: Held, settings: PassSettings) -> bool:
    """Whether the next step should decode instead, so that more prompts come together.

    They go when the pass is full, or one of them would miss the TTFT target by waiting on (whoever has missed it gains by
    throughput alone); when they have waited, together, for as long as those who decode would be kept waiting by the
    experts of one pass more; and after MOST_STREAMS in any case.
    """
    stream_seconds = costs.stream_seconds
    if not settings.fill or not ready.num_decoding or not stream_seconds:
        return False
    if ready.num_tokens >= full_tokens(costs):
        return False
    if held.request_seconds >= ready.num_decoding * stream_seconds:
        return False
    if held.seconds >= MOST_STREAMS * stream_seconds:
        return False
    if settings.ttft_seconds is None:
        return True
    # The next step begins when the one in flight has ended.
    step_seconds = costs.decode_seconds + costs.row_seconds * ready.num_decoding
    latest = settings.ttft_seconds - step_seconds - pass_seconds(ready.num_tokens, costs)
    return not any(latest - step_seconds < waited <= latest for waited in ready.waited_seconds)


def most_running(costs: StepCosts, settings: PassSettings) -> int:
    """Requests of which a decode step is expected to keep the target between tokens; at least one."""
    if settings.itl_seconds is None or not costs.row_seconds:
        return UNBOUNDED
    return _at_least_one((settings.itl_seconds - costs.decode_seconds) / costs.row_seconds)


def _covering_tokens(costs: StepCosts) -> int:
    """Tokens that are computed for as long as the experts of a pass take to come; 0 while nothing is measured."""
    if not costs.token_seconds:
        return 0
    return math.ceil(min(costs.stream_seconds / costs.token_seconds, UNBOUNDED))


def _tokens_within(seconds: float | None, costs: StepCosts) -> int:
    """Tokens of the longest pass that takes no more than this; at least one, so that all go on."""
    if seconds is None or not costs.token_seconds:
        return UNBOUNDED
    stream_seconds = 0.0 if costs.loads_overlap else costs.stream_seconds
    return _at_least_one((seconds - stream_seconds) / costs.token_seconds)


def _at_least_one(number: float) -> int:
    """Rounded down. What is measured may be next to nothing, and what is divided by it without bounds."""
    return int(max(1.0, min(number, UNBOUNDED)))
