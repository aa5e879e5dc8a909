"""Record a model on several domains of text: one request at a time, in batches, and in conversations.

    python -m eval.reference_traces --model-path MODEL --output FOLDER

Half of the experts fit beside the KV cache, so that memory is under pressure while it is recorded.
The text is this machine's (`demo_model/prompts.py`).
"""

import argparse
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from eval.demo_model.prompts import PROMPT_CHARACTERS, prompts_by_domain
from eval.parity import memory_budget
from eval.servers import OURS, running
from eval.trace import record

NUM_NEW_TOKENS = 64
NUM_CONVERSATIONS, NUM_TURNS = 6, 4


def requests_for(prompts: list[str], seed: int) -> list[dict[str, Any]]:
    """Sampled, so that a small model does not repeat itself; of different lengths."""
    rng = random.Random(seed)
    return [
        {
            "text": prompt,
            "sampling_params": {
                "temperature": 0.7,
                "max_new_tokens": rng.randrange(NUM_NEW_TOKENS // 2, NUM_NEW_TOKENS),
                "ignore_eos": True,
            },
        }
        for prompt in prompts
    ]


def conversations(by_domain: dict[str, list[str]]) -> list[str]:
    """Turn by turn, of all conversations: half of them begin alike, each goes on with its own text."""
    starts = [by_domain[domain][0] + by_domain[domain][1] for domain in ("python", "prose")]
    texts = [starts[number % 2] for number in range(NUM_CONVERSATIONS)]
    turns = []
    for turn in range(NUM_TURNS):
        for number in range(NUM_CONVERSATIONS):
            domain = ("python", "prose")[number % 2]
            more = by_domain[domain][2 + number * NUM_TURNS + turn]
            texts[number] += "\n" + more[: PROMPT_CHARACTERS // 2]
            turns.append(texts[number])
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for the traces")
    parser.add_argument("--only", help="name of the one trace to record")
    options = parser.parse_args()
    by_domain = prompts_by_domain(48)
    mixed = [prompt for group in zip(*by_domain.values(), strict=True) for prompt in group]
    runs = {f"{domain}-1": (prompts[:6], 1) for domain, prompts in by_domain.items()}
    runs |= {"mixed-4": (mixed[24:36], 4), "mixed-8": (mixed[24:48], 8)}
    runs |= {"mixed-16": (mixed[24:56], 16), "mixed-32": (mixed[48:88], 32)}
    runs |= {"turns-4": (conversations(by_domain), 4)}
    runs = {name: run for name, run in runs.items() if options.only in (None, name)}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"] = folder
        flags = [f"--model-path={options.model_path}", "--random-seed=0"]
        with running(OURS, *flags) as server:
            state = server.state()
        for name, (prompts, concurrency) in runs.items():
            budget = memory_budget("50%", state, concurrency * PROMPT_CHARACTERS // 2)
            with running(OURS, *flags, f"--memory-budget={budget}") as server:
                requests = requests_for(prompts, seed=concurrency)
                output = options.output / f"{name}.npz"
                print(record(server.url, requests, output, concurrency=concurrency))


if __name__ == "__main__":
    main()
