"""What predictors need of a loaded model: its routers and its input embeddings, as numpy arrays.

One of the files that know sglang.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sglmoe.prediction.predictor import Embed
from sglmoe.prediction.router import Floats, Router


def read_router(model: torch.nn.Module, layer_ids: Sequence[int]) -> Router | None:
    """The routers of the layers with these ids, in this order (`PagedExperts.layer_ids`): a float32 copy.

    None where some are not found, and where experts are chosen by a rule that `Router` does not have.
    """
    found = {module.experts.layer_id: module for module in model.modules() if is_moe_block(module)}
    if not layer_ids or set(found) != set(layer_ids):
        return None
    blocks = [found[layer_id] for layer_id in layer_ids]
    rule, *others = [rule_of(block) for block in blocks]
    if rule is None or any(other != rule for other in others):
        return None
    return Router(
        weights=np.stack([as_floats(block.gate.weight) for block in blocks]),
        logit_bias=stacked([getattr(block.gate, "bias", None) for block in blocks]),
        correction_bias=stacked([block.topk.topk_config.correction_bias for block in blocks]),
        **rule,
    )


def is_moe_block(module: Any) -> bool:
    """Qwen, Mixtral, DeepSeek, OLMoE and Phi name the three parts alike."""
    return all(hasattr(module, part) for part in ("gate", "topk", "experts"))


def rule_of(block: Any) -> dict[str, Any] | None:
    """How sglang's `select_experts` chooses for a MoE block: fields of `Router`, or None for what it does not have."""
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.models.phimoe import phimoe_routing_function

    # DeepSeek-V4 looks experts up by token (HashTopK) in some layers.
    if not isinstance(block.topk, TopK) or not hasattr(block.gate, "weight"):
        return None
    config = block.topk.topk_config
    # Of Phi-MoE's sparsemixer the choice is the top 2; jitter is for training.
    is_plain = config.custom_routing_function in (None, phimoe_routing_function)
    if not is_plain or config.num_shared_topk_slots:
        return None
    # In groups with a correction sglang takes the sigmoid, whatever is configured (biased_grouped_topk).
    has_correction = config.correction_bias is not None
    scoring = "sigmoid" if config.use_grouped_topk and has_correction else config.scoring_func
    if scoring not in ("softmax", "sigmoid"):
        return None
    in_groups = config.use_grouped_topk
    return {
        "top_k": config.top_k,
        "scoring": scoring,
        "num_groups": config.num_expert_group if in_groups else 1,
        "top_groups": config.topk_group if in_groups else 1,
    }


def embedding_of(model: Any) -> Embed:
    """Looks token ids [T] up in the model's own table: float32 [T, hidden]."""
    table = model.model.embed_tokens.weight.detach()

    def embed(token_ids: npt.NDArray[np.int32]) -> Floats:
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(table.device)
        return as_floats(table[ids])

    return embed


def stacked(biases: list[torch.Tensor | None]) -> Floats | None:
    """One a layer, or None where no layer has any."""
    present = [as_floats(bias) for bias in biases if bias is not None]
    assert len(present) in (0, len(biases)), "some layers have a bias and some have none"
    return np.stack(present) if present else None


def as_floats(tensor: torch.Tensor) -> Floats:
    copied: Floats = tensor.detach().to("cpu", torch.float32).numpy()
    return copied
