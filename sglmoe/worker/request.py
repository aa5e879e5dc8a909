"""A request as the worker sees it: its tokens, how far its KV reaches, and where its row of the token table is.

Whether a request is finished, and what its client has been sent, is the scheduler's to know.
"""

from array import array

import msgspec

from sglmoe.protocol import NewRequest


class WorkerRequest:
    """One request between `AddRequests` and the plan that drops it."""

    def __init__(self, spec: NewRequest):
        self.spec = spec
        self.rid = spec.rid
        self.tokens = array("i", spec.prompt_ids)  # prompt and output, in one
        self.num_prompt = len(self.tokens)
        self.tokens.frombytes(spec.output_ids)
        self.num_computed = 0
        self.num_cached = 0
        self.table_row = -1  # row of req_to_token; -1 while it holds no memory
        # Prompt logprobs and routing are sent once, even if a preemption makes us compute a position again.
        self.next_logprob = spec.logprobs.start if spec.logprobs else self.num_prompt
        self.next_routed = spec.routed_experts_start

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_tokens_left(self) -> int:
        """That it may still ask for."""
        return max(0, self.spec.max_new_tokens - self.num_output)

    @property
    def holds_memory(self) -> bool:
        return self.table_row >= 0

    @property
    def max_cached(self) -> int:
        """How many tokens may come from the cache: not those whose logprobs or routing are still owed, nor the last one."""
        limit = len(self.tokens) - 1
        if self.next_logprob < self.num_prompt:
            limit = min(limit, self.next_logprob)
        if self.next_routed is not None:
            limit = min(limit, self.next_routed)
        return limit

    def token_bytes(self, num_tokens: int) -> bytes:
        return self.tokens[:num_tokens].tobytes()


class BatchRow(msgspec.Struct, frozen=True):
    """Positions `[start, stop)` of a request, to be computed in this step."""

    request: WorkerRequest
    start: int
    stop: int
    samples: bool  # the last position's logits give the next token
    decodes: bool  # this is the one position after the last sampled token

    @classmethod
    def of(cls, request: WorkerRequest, start: int, stop: int) -> "BatchRow":
        """As the request's tokens are now; later ones make no difference."""
        num_tokens = len(request.tokens)
        decodes = request.num_output > 0 and start == num_tokens - 1
        return cls(request, start, stop, samples=stop == num_tokens, decodes=decodes)
