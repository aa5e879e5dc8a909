"""Record a model on several domains of text, one request at a time and in batches.

    python -m eval.reference_traces --model-path MODEL --output FOLDER

Half of the experts fit beside the KV cache, so that memory is under pressure while it is recorded.
The text is this machine's (`demo_model/corpus.py`); what the model was trained on is left out.
"""

import argparse
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from eval.demo_model.corpus import read_corpus
from eval.demo_model.tasks import arithmetic_document, recall_document
from eval.parity import memory_budget
from eval.servers import OURS, running
from eval.trace import record

PROMPT_CHARACTERS = 300
NUM_NEW_TOKENS = 64


def prompts_by_domain(count: int) -> dict[str, list[str]]:
    """`count` beginnings of each domain, none of them read in training."""
    rng = random.Random("reference traces")
    held_out = read_corpus().held_out
    prompts = {}
    for domain in ("python", "prose"):
        texts = [text for text in held_out[domain] if len(text) > 4 * PROMPT_CHARACTERS]
        starts = [(rng.choice(texts), rng.random()) for _ in range(count)]
        prompts[domain] = [piece(text, at) for text, at in starts]
    prompts["arithmetic"] = [arithmetic_document(rng)[:PROMPT_CHARACTERS] for _ in range(count)]
    prompts["recall"] = [recall_document(rng)[:PROMPT_CHARACTERS] for _ in range(count)]
    return prompts


def piece(text: str, at: float) -> str:
    start = int(at * (len(text) - PROMPT_CHARACTERS))
    return text[start : start + PROMPT_CHARACTERS]


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for the traces")
    options = parser.parse_args()
    by_domain = prompts_by_domain(48)
    mixed = [prompt for group in zip(*by_domain.values(), strict=True) for prompt in group]
    runs = {f"{domain}-1": (prompts[:6], 1) for domain, prompts in by_domain.items()}
    runs |= {"mixed-8": (mixed[24:48], 8), "mixed-32": (mixed[48:96], 32)}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"] = folder
        flags = [f"--model-path={options.model_path}", "--random-seed=0"]
        with running(OURS, *flags) as server:
            state = server.state()
        for name, (prompts, concurrency) in runs.items():
            budget = memory_budget("50%", state, concurrency * 3 * PROMPT_CHARACTERS // 4)
            with running(OURS, *flags, f"--memory-budget={budget}") as server:
                requests = requests_for(prompts, seed=concurrency)
                output = options.output / f"{name}.npz"
                print(record(server.url, requests, output, concurrency=concurrency))


if __name__ == "__main__":
    main()
