"""The bundled demo model: a tiny random Qwen3-MoE, made once and kept in the user's cache.

It answers nonsense, at once and on any machine: four layers of 32 experts, 29 MB. Until a trained one is bundled.
"""

import os
import shutil
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

VERSION = 1  # counts up when the files that make_demo_model writes change
VOCAB_SIZE = 2048
SEED = 0
# Experts differ little in a fresh model; larger weights make greedy choices clear.
WEIGHT_SCALE = 3.0
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def demo_model_path(environ: Mapping[str, str]) -> Path:
    cache = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sglmoe" / f"demo-model-{VERSION}"


def ensure_demo_model(path: Path) -> Path:
    """Make the model unless it is there already. Several processes may do so at once; the first to finish wins."""
    if (path / "config.json").exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=path.name, dir=path.parent))
    try:
        make_demo_model(unfinished)
        unfinished.chmod(0o755)
        os.rename(unfinished, path)
    except OSError:
        if not (path / "config.json").exists():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def make_demo_model(folder: Path) -> None:
    """Write config, weights and tokenizer; the same bytes each time."""
    _write_weights(folder)
    _write_tokenizer(folder)


def _write_weights(folder: Path) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        norm_topk_prob=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen3MoeForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(WEIGHT_SCALE)
        model.to(torch.bfloat16).save_pretrained(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Any text will do; every Python has this one.
    text = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:100]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in text], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
