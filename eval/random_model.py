"""A random Mixture-of-Experts model whose experts cost something to move, even between two places in one memory.

    python -m eval.random_model --output /tmp/random-moe

The demo model's experts take 48 KiB: loading one costs less than calling for it. Here an expert's
bytes are the better part of a decode step's time. It speaks the demo model's tokens, so that it can be asked in
text, whose few frequent and many rare words route unevenly; its answers mean nothing. Float32 if not
told otherwise: on a CPU without bfloat16 arithmetic half precision is slow to compute and quick to load;
bfloat16 is what can be packed.
"""

import argparse
import math
from pathlib import Path

import torch
import transformers

from sglmoe.demo_model import DEMO_MODEL

SEED = 0


def random_model(options: argparse.Namespace) -> transformers.PreTrainedModel:
    """Unit-gain weights; a token's state owes as much to itself as to its context."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        head_dim=options.hidden_size // options.heads,
        intermediate_size=options.hidden_size,
        moe_intermediate_size=options.expert_size,
        num_experts=options.experts,
        num_experts_per_tok=options.experts_per_token,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                gain = 1.0 if "embed_tokens" in name else 1 / math.sqrt(parameter.shape[-1])
                parameter.copy_(gain * torch.randn(parameter.shape, generator=generator))
        follow_a_cycle(model, generator)
    return model


def follow_a_cycle(model: transformers.PreTrainedModel, generator: torch.Generator) -> None:
    """Have each token call for one other, so that greedy answers do not stay with one word and its experts."""
    embeddings = model.get_input_embeddings().weight
    cycle = torch.randperm(len(embeddings), generator=generator)
    model.get_output_embeddings().weight[cycle.roll(-1)] = embeddings[cycle]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32, help="in each layer")
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--expert-size", type=int, default=512, help="inner size of an expert")
    parser.add_argument("--heads", type=int, default=8, help="as many for keys and values")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    random_model(options).to(dtype).save_pretrained(options.output)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (options.output / name).write_bytes((DEMO_MODEL / name).read_bytes())
    expert_bytes = 3 * dtype.itemsize * options.hidden_size * options.expert_size
    print(f"{options.output}: an expert takes {expert_bytes:,} bytes")


if __name__ == "__main__":
    main()
