"""Decode steps eager, out of graphs that break at each MoE layer, and out of full ones: `python -m eval.decode_graphs`.

One engine after the other serves the demo model, with half of its experts in frames and all in host memory: requests alone,
whose steps are captured without padding, so that answers have to be the same to the bit (the status is 1 otherwise), then 3
and 4 at once, of which the former are padded. What decode steps cost is as the worker has measured it. Each engine's line comes
as soon as it is known. No GPU has run this yet.
"""

import json
import sys
import time
import traceback
from typing import Any, NamedTuple

from eval.kernel_speed import described
from sglmoe.decode_graphs import graph_bytes

CAPTURED = 4
PROMPTS = [list(range(10 + index, 200, 7 + index)) for index in range(CAPTURED)]
NUM_TOKENS = 256
BUDGET_BYTES = 8_000_000  # 2.4 MB of dense weights, 3.5 of experts, and KV
# By default SGLang takes FA3 on Hopper, whose library of a gigabyte may be missing, and FlashInfer, which compiles for minutes.
BACKENDS = {"attention_backend": "triton", "sampling_backend": "pytorch"}
GRAPH_BYTES = graph_bytes(CAPTURED, context_tokens=4096, vocab_size=2048)


class Found(NamedTuple):
    """Of one engine."""

    alone: list[Any]  # token ids and log probabilities
    costs: dict[str, Any]  # of `/server_info`
    expert_misses: int
    followed_steps: int  # behind which another one began


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
        **BACKENDS,
        **flags,
        **options,
    )
    try:
        alone = [ask(engine, [prompt])[0] for prompt in PROMPTS]
        for num_requests in (3, CAPTURED):
            ask(engine, PROMPTS[:num_requests])
        (state,) = engine.get_server_info()["internal_states"]
        memory, costs = state["sglmoe"]["memory"], state["sglmoe"]["costs"]
        return Found(alone, costs, memory["expert_misses"], memory["followed_steps"])
    finally:
        engine.shutdown()


def main() -> int:
    """One after the other, whatever becomes of those before: who waits for a GPU learns what can be learnt."""
    print(json.dumps(described()), flush=True)
    kinds: dict[str, tuple[str, dict[str, str]]] = {
        "eager": ("disabled", {}),
        "breakable": ("breakable", {}),
        "full": ("full", {}),
        "full, prefetching": ("full", {"expert_prefetch": "on"}),
    }
    answers: list[Any] = []
    for name, (backend, options) in kinds.items():
        started = time.perf_counter()
        try:
            its = measure(backend, **options)
        except Exception:
            traceback.print_exc()
            answers.append(None)
            continue
        answers.append(its.alone)
        said = {
            "same_bits": its.alone == answers[0],
            "costs": its.costs,
            "expert_misses": its.expert_misses,
            "followed_steps": its.followed_steps,
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(json.dumps({name: said}), flush=True)
    return 0 if all(its == answers[0] is not None for its in answers) else 1


if __name__ == "__main__":
    sys.exit(main())
