"""Decode steps eager and out of captured graphs that break at each MoE layer: `python -m eval.decode_graphs [OUT.json]`.

One engine after the other serves the demo model, with `--share` of its experts in frames. Of each: what it answers to lone
requests, whose steps are captured without padding, so answers have to be the same to the bit; and what a decode step takes,
the least of some rounds, with one request and with as many as are captured (4) and padded (3). Ends with status 1
where bits differ. No GPU has run this yet.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from eval.kernel_speed import described
from sglmoe.demo_model import DEMO_MODEL
from sglmoe.plan.model_shape import read_model
from sglmoe.worker.model_runner_graphs import graph_bytes

CAPTURED = 4
PROMPTS = [list(range(10 + index, 200, 7 + index)) for index in range(CAPTURED)]
NUM_REQUESTS = (1, 3, 4)
ROUNDS = 5
SHORT, LONG = 8, 72  # tokens; what is between them is decode steps
KV_FRAMES = 48


class Answer(NamedTuple):
    token_ids: list[int]
    logprobs: list[float]


class Found(NamedTuple):
    """Of one engine."""

    alone: list[Answer]
    step_seconds: dict[int, float]  # by the number of requests
    memory: dict[str, Any]


def budget_bytes(share: float, device: str, *, has_graphs: bool) -> int:
    """For dense weights, that share of the experts, some KV, and what graphs are taken to need."""
    shape = read_model(str(DEMO_MODEL), device=device).shape
    frames = int(share * shape.all_experts) + KV_FRAMES
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    graphs = graph_bytes(
        CAPTURED,
        context_tokens=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
    )
    whole = shape.dense_bytes + int(1.05 * frames * shape.expert_bytes)
    return whole + graphs if has_graphs else whole


def ask(engine: Any, prompts: list[list[int]], num_tokens: int) -> list[Answer]:
    outputs = engine.generate(
        input_ids=prompts,
        sampling_params={"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True},
        return_logprob=True,
    )
    return [
        Answer(its["output_ids"], [entry[0] for entry in its["meta_info"]["output_token_logprobs"]])
        for its in outputs
    ]


def step_seconds(engine: Any, num_requests: int) -> float:
    """Of one decode step: prompts are cached by the second round."""
    prompts = PROMPTS[:num_requests]
    least = dict.fromkeys((SHORT, LONG), float("inf"))
    for _ in range(ROUNDS):
        for num_tokens in least:
            started = time.perf_counter()
            ask(engine, prompts, num_tokens)
            least[num_tokens] = min(least[num_tokens], time.perf_counter() - started)
    return (least[LONG] - least[SHORT]) / (LONG - SHORT)


def measure(backend: str, *, device: str, share: float) -> Found:
    from sglmoe import Engine

    has_graphs = backend != "disabled"
    sizes: dict[str, Any] = {"cuda_graph_max_bs_decode": CAPTURED} if has_graphs else {}
    engine = Engine(
        device=device,
        memory_budget=str(budget_bytes(share, device, has_graphs=has_graphs)),
        max_running_requests=8,
        random_seed=0,
        cuda_graph_backend_decode=backend,
        **sizes,
    )
    try:
        alone = [ask(engine, [prompt], LONG)[0] for prompt in PROMPTS]
        seconds = {count: step_seconds(engine, count) for count in NUM_REQUESTS}
        (state,) = engine.get_server_info()["internal_states"]
        return Found(alone, seconds, dict(state["sglmoe"]["memory"]))
    finally:
        engine.shutdown()


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs=2, default=["disabled", "breakable"])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    eager, captured = (
        measure(its, device=options.device, share=options.share) for its in options.backends
    )
    ratios = {
        count: captured.step_seconds[count] / seconds
        for count, seconds in eager.step_seconds.items()
    }
    found = {
        **described(),
        "backends": options.backends,
        "step_milliseconds": [
            {count: round(1e3 * seconds, 3) for count, seconds in its.step_seconds.items()}
            for its in (eager, captured)
        ],
        "ratio": {count: round(ratio, 3) for count, ratio in ratios.items()},
        "same_bits": captured.alone == eager.alone,
        "expert_misses": [its.memory["expert_misses"] for its in (eager, captured)],
    }
    print(json.dumps(found, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["same_bits"] else 1


if __name__ == "__main__":
    sys.exit(main())
