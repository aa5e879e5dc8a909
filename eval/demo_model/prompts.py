"""Prompts of several domains, none of them read in training: for benchmarks and traces."""

import random

from eval.demo_model.corpus import read_corpus
from eval.demo_model.tasks import arithmetic_document, recall_document

PROMPT_CHARACTERS = 300


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
