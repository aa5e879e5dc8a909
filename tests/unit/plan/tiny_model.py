"""A model that fits a page, for plans."""

from sglmoe.plan.cost_model import CostModel
from sglmoe.plan.model_shape import ModelShape

# 2 layers of 8 experts of 1024 bytes, of which a token takes 2. A frame holds an expert, or 4 pages of 16 tokens.
TINY = ModelShape(
    architecture="Qwen3MoeForCausalLM",
    num_layers=2,
    num_moe_layers=2,
    num_experts=8,
    top_k=2,
    hidden_size=16,
    inner_size=11,
    expert_bytes=1024,
    dense_bytes=5000,
    token_bytes=16,
    token_rows=4,
    context_tokens=4096,
    vocab_size=1024,
    item_bytes=2,
)
COSTS = CostModel(
    fixed_seconds=1.0, request_seconds=0.0, expert_seconds=0.0, load_seconds=0.5, disk_seconds=8.0
)


def budget_of(num_frames: int) -> int:
    return TINY.dense_bytes + 1024 * num_frames
