"""Decode steps eager, out of graphs that break at each MoE layer, and out of full ones: `python -m eval.decode_graphs`.

One engine after the other serves the demo model, with half of its experts in frames and all in host memory: requests alone,
whose steps are captured without padding, so that answers have to be the same to the bit (the status is 1 otherwise), then 3
and 4 at once, of which the former are padded. What decode steps cost is as the worker has measured it. No GPU has run this yet.
"""

import json
import sys
from typing import Any, NamedTuple

from eval.kernel_speed import described
from sglmoe.decode_graphs import graph_bytes

CAPTURED = 4
PROMPTS = [list(range(10 + index, 200, 7 + index)) for index in range(CAPTURED)]
NUM_TOKENS = 256
BUDGET_BYTES = 8_000_000  # 2.4 MB of dense weights, 3.5 of experts, and KV
GRAPH_BYTES = graph_bytes(CAPTURED, context_tokens=4096, vocab_size=2048)


class Found(NamedTuple):
    """Of one engine."""

    alone: list[Any]  # token ids and log probabilities
    costs: dict[str, Any]  # of `/server_info`
    expert_misses: int


def ask(engine: Any, prompts: list[list[int]]) -> list[Any]:
    outputs = engine.generate(
        input_ids=prompts,
        sampling_params={"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True},
        return_logprob=True,
    )
    return [(its["output_ids"], its["meta_info"]["output_token_logprobs"]) for its in outputs]


def measure(backend: str, **options: Any) -> Found:
    """With SGLang's `--cuda-graph-backend-decode`."""
    from sglmoe import Engine

    is_captured = backend != "disabled"
    flags: dict[str, Any] = {"cuda_graph_max_bs_decode": CAPTURED} if is_captured else {}
    engine = Engine(
        memory_budget=str(BUDGET_BYTES + is_captured * GRAPH_BYTES),
        max_running_requests=8,
        random_seed=0,
        cuda_graph_backend_decode=backend,
        host_memory="64MB",
        **flags,
        **options,
    )
    try:
        alone = [ask(engine, [prompt])[0] for prompt in PROMPTS]
        for num_requests in (3, CAPTURED):
            ask(engine, PROMPTS[:num_requests])
        (state,) = engine.get_server_info()["internal_states"]
        memory, costs = state["sglmoe"]["memory"], state["sglmoe"]["costs"]
        return Found(alone, costs, memory["expert_misses"])
    finally:
        engine.shutdown()


def main() -> int:
    eager = measure("disabled")
    captured = {
        "breakable": measure("breakable"),
        "full": measure("full"),
        "full, prefetching": measure("full", expert_prefetch="on"),
    }
    same_bits = all(its.alone == eager.alone for its in captured.values())
    steps = {name: its[1:] for name, its in ({"eager": eager} | captured).items()}
    print(json.dumps({**described(), "same_bits": same_bits, **steps}, indent=1))
    return 0 if same_bits else 1


if __name__ == "__main__":
    sys.exit(main())
