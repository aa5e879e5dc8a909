"""The unmodified SGLang engine, asked offline. Everything here runs in a fork (`forking`)."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """A greedy answer: its tokens, their log-probabilities, and the prompt's but for its first."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]


def flush_cache(engine: Any) -> None:
    """As soon as it can: SGLang's scheduler may not know yet that the last request has ended, and refuses then."""
    deadline = time.monotonic() + 10
    while not engine.flush_cache().success:
        assert time.monotonic() < deadline, "the cache can't be flushed"
        time.sleep(0.01)


@contextmanager
def running_engine(model_dir: Path, **server_args: Any) -> Iterator[Any]:
    """A `sglang.Engine` with room for 16 requests and 4096 tokens."""
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(
        model_path=str(model_dir),
        device="cpu",
        max_total_tokens=4096,
        max_running_requests=16,
        random_seed=0,
        log_level="warning",
        **server_args,
    )
    try:
        yield engine
    finally:
        engine.shutdown()


def greedy_answers(
    model_dir: Path, prompts: Sequence[Sequence[int]], num_tokens: int, **server_args: Any
) -> list[Answer]:
    """Answer all prompts (token ids) at once, ends of sequence ignored."""
    with running_engine(model_dir, **server_args) as engine:
        outputs = engine.generate(
            input_ids=[list(prompt) for prompt in prompts],
            sampling_params=greedy(num_tokens),
            return_logprob=True,
            logprob_start_len=0,
        )
    return [
        Answer(
            tokens=output["output_ids"],
            logprobs=[entry[0] for entry in output["meta_info"]["output_token_logprobs"]],
            prompt_logprobs=[entry[0] for entry in output["meta_info"]["input_token_logprobs"][1:]],
        )
        for output in outputs
    ]


def greedy(num_tokens: int) -> dict[str, Any]:
    """Sampling parameters of a greedy answer of exactly `num_tokens`."""
    return {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True}
