"""What a model answers according to Hugging Face transformers in float32: the independent referee.

One prompt at a time, without padding and without a KV cache, so that nothing is shared with us.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def hf_greedy(
    model_dir: Path, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[list[int]]:
    """Continue each prompt (token ids) greedily by `num_tokens`, end-of-sequence ignored."""
    return [tokens for tokens, _ in _continue_all(model_dir, prompts, num_tokens)]


def hf_gaps(model_dir: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[float]:
    """The smallest lead of a greedy token over the runner-up, in logits, along each answer."""
    return [
        min(float(top.values[0] - top.values[1]) for top in (row.topk(2) for row in logits))
        for _, logits in _continue_all(model_dir, prompts, num_tokens)
    ]


def hf_logprobs(model_dir: Path, tokens: Sequence[int]) -> list[float]:
    """Log-probability of each token of `tokens` but the first, given those before it."""
    logits = _logits(_load(model_dir), tokens)[:-1]
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)
    return [float(logprob) for logprob in chosen]


def _continue_all(
    model_dir: Path, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[tuple[list[int], list[torch.Tensor]]]:
    model = _load(model_dir)
    return [_continue(model, prompt, num_tokens) for prompt in prompts]


def _continue(
    model: torch.nn.Module, prompt: Sequence[int], num_tokens: int
) -> tuple[list[int], list[torch.Tensor]]:
    tokens, rows = list(prompt), []
    for _ in range(num_tokens):
        rows.append(_logits(model, tokens)[-1])
        tokens.append(int(rows[-1].argmax()))
    return tokens[len(prompt) :], rows


def _load(model_dir: Path) -> torch.nn.Module:
    torch.set_num_threads(1)  # more cost tiny models more than they bring
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@torch.inference_mode()
def _logits(model: torch.nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [len(tokens), vocab_size], float32."""
    logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits
