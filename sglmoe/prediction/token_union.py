"""From tokens to their step: how likely it is that any of them uses an expert."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def sampled_tokens(num_tokens: int, max_tokens: int) -> npt.NDArray[np.intp]:
    """The tokens that stand for a step: all, or `max_tokens` evenly spaced with the last among them."""
    num_sampled = min(num_tokens, max_tokens)
    return np.arange(1, num_sampled + 1) * num_tokens // max(num_sampled, 1) - 1


def any_token(probabilities: Floats, num_tokens: int) -> Floats:
    """1 - prod(1 - p) over the first axis.

    `probabilities`: float32 [sampled tokens, ...], 0 to 1. The tokens of the step that are not among
    the sampled ones are taken to be like those.
    """
    if len(probabilities) == 1 and num_tokens == 1:
        only: Floats = probabilities[0]
        return only
    none: Floats = np.prod(1 - probabilities, axis=0)
    if num_tokens > len(probabilities) > 0:
        none = none ** np.float32(num_tokens / len(probabilities))
    return 1 - none
