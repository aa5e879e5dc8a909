"""Decode steps eager and out of captured graphs that break at each MoE layer: `python -m eval.decode_graphs [OUT.json]`.

One engine after the other serves the demo model, with half of its experts in frames. Lone requests' steps are captured without
padding, so their answers have to be the same to the bit: the status is 1 otherwise. And what a decode step takes, the least of
some rounds, with one request, with as many as are captured (4) and with a step that is padded (3). No GPU has run this yet.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from eval.kernel_speed import described
from sglmoe.worker.model_runner_graphs import graph_bytes

CAPTURED = 4
PROMPTS = [list(range(10 + index, 200, 7 + index)) for index in range(CAPTURED)]
NUM_REQUESTS = (1, 3, CAPTURED)
ROUNDS = 5
SHORT, LONG = 8, 72  # tokens; what is between them is decode steps
BUDGET_BYTES = 8_000_000  # 2.4 MB of dense weights, 3.5 of experts, and KV
GRAPH_BYTES = graph_bytes(CAPTURED, context_tokens=4096, vocab_size=2048)


class Found(NamedTuple):
    """Of one engine."""

    alone: list[Any]  # token ids and log probabilities
    step_seconds: dict[int, float]  # by the number of requests
    expert_misses: int


def ask(engine: Any, prompts: list[list[int]], num_tokens: int) -> list[Any]:
    outputs = engine.generate(
        input_ids=prompts,
        sampling_params={"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True},
        return_logprob=True,
    )
    return [(its["output_ids"], its["meta_info"]["output_token_logprobs"]) for its in outputs]


def step_seconds(engine: Any, prompts: list[list[int]]) -> float:
    """Of one decode step; prompts are cached by the second round."""
    least = dict.fromkeys((SHORT, LONG), float("inf"))
    for num_tokens in (SHORT, LONG) * ROUNDS:
        started = time.perf_counter()
        ask(engine, prompts, num_tokens)
        least[num_tokens] = min(least[num_tokens], time.perf_counter() - started)
    return (least[LONG] - least[SHORT]) / (LONG - SHORT)


def measure(backend: str) -> Found:
    """With SGLang's `--cuda-graph-backend-decode`."""
    from sglmoe import Engine

    is_captured = backend != "disabled"
    flags: dict[str, Any] = {"cuda_graph_max_bs_decode": CAPTURED} if is_captured else {}
    engine = Engine(
        memory_budget=str(BUDGET_BYTES + is_captured * GRAPH_BYTES),
        max_running_requests=8,
        random_seed=0,
        cuda_graph_backend_decode=backend,
        **flags,
    )
    try:
        alone = [ask(engine, [prompt], LONG)[0] for prompt in PROMPTS]
        seconds = {count: step_seconds(engine, PROMPTS[:count]) for count in NUM_REQUESTS}
        (state,) = engine.get_server_info()["internal_states"]
        return Found(alone, seconds, state["sglmoe"]["memory"]["expert_misses"])
    finally:
        engine.shutdown()


def main() -> int:
    eager, captured = measure("disabled"), measure("breakable")
    found = {
        **described(),
        "eager_seconds": eager.step_seconds,
        "captured_seconds": captured.step_seconds,
        "expert_misses": [eager.expert_misses, captured.expert_misses],
        "same_bits": captured.alone == eager.alone,
    }
    print(json.dumps(found, indent=1))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["same_bits"] else 1


if __name__ == "__main__":
    sys.exit(main())
