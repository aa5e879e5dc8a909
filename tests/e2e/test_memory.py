"""The worker's memory stays within the budget, however many bytes of experts pass through it."""

from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import transformers
from checkpoints import VOCAB_SIZE, make_tokenizer
from forking import run_in_fork
from sglmoe_engine import frames_budget, running_sglmoe, state_of

pytestmark = pytest.mark.usefixtures("preloaded")

NUM_EXPERTS = 480  # in all layers
SHARES = (0.1, 0.2, 0.5, 1.0)  # of them, that there are frames for
# What a worker takes beside its budget once it is ready, measured 170 MB with any budget: what
# torch sets up at the first forward pass, activations, pages that fork shared and Python wrote to.
SLACK_BYTES = 256 * 2**20


class Usage(NamedTuple):
    """The worker's own memory (resident and not shared with the fork server), in bytes."""

    when_ready: int
    in_the_end: int
    state: dict[str, Any]


def make_large_checkpoint(directory: Path) -> Path:
    """3 layers of 160 experts of 1.03 MiB: 495 MiB."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=160,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def serve_everything(model_dir: Path, memory_budget: str) -> Usage:
    with running_sglmoe(model_dir, memory_budget=memory_budget) as engine:
        worker = psutil.Process(state_of(engine)["worker_pid"])
        when_ready = worker.memory_full_info().uss
        prompts = [[5 + (17 * i + j) % 1000 for j in range(100)] for i in range(8)]
        for _ in range(2):
            engine.generate(
                input_ids=prompts, sampling_params={"max_new_tokens": 8, "temperature": 0}
            )
        return Usage(when_ready, worker.memory_full_info().uss, state_of(engine))


def test_any_share_of_the_experts_keeps_to_its_budget(tmp_path: Path) -> None:
    model_dir = run_in_fork(make_large_checkpoint, tmp_path)
    state = run_in_fork(serve_everything, model_dir, "600MB").state
    for share in SHARES:
        num_frames = int(share * NUM_EXPERTS)
        usage = run_in_fork(serve_everything, model_dir, frames_budget(state, num_frames))
        limits, memory = usage.state["limits"], usage.state["memory"]
        assert memory["num_frames"] == num_frames
        assert limits["arena_bytes"] == num_frames * memory["frame_bytes"]
        grown = usage.in_the_end - usage.when_ready
        assert grown < limits["arena_bytes"] + SLACK_BYTES, share
        # And when it was ready, it did not hold the checkpoint.
        assert usage.when_ready < limits["expert_bytes"]
        if share == min(SHARES):
            assert memory["expert_bytes_moved"] > 480 * 2**20
