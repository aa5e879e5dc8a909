"""How large packed experts are, by the indexes of their files."""

import re
from collections import Counter

from sglmoe.memory.expert_layout import Plain
from sglmoe.memory.staging import slot_bytes
from sglmoe.packed_checkpoint import PackedLayer, find_layers
from sglmoe.plan.model_shape import Model, ModelShape

EXPERT = re.compile(r"\blayers\.(\d+)\..*\bexperts\.(\d+)\.")


def stored_bytes_of(model: Model, wanted: str, device: str) -> int:
    """Of the largest expert, as host memory beside a GPU has it, with so many of the checkpoint's packed as there are; 0 where
    none is. `wanted`: --packed-experts.

    Raises ValueError where a server would refuse it.
    """
    if device == "cpu":
        return 0
    # Others are no views of the checkpoint.
    in_place = model.shape.format == Plain("bfloat16")
    shards = [shard.resolve() for shard in model.shards] if in_place else []
    layers, _ = find_layers(wanted, model.name, shards)
    return stored_expert_bytes(layers, model.shape) if layers else 0


def stored_expert_bytes(layers: list[PackedLayer], shape: ModelShape) -> int:
    """Of the largest expert, packed or not."""
    saved: Counter[tuple[str, str]] = Counter()
    for tensor in (tensor for layer in layers for tensor in layer.index.tensors):
        match = EXPERT.search(tensor.name)
        if match and int(match[1]) < shape.num_layers:  # one beyond predicts, and is not served
            saved[match[1], match[2]] += tensor.num_bytes - slot_bytes(tensor.packed_bytes)
    others = [0] if len(saved) < shape.all_experts else []
    return shape.expert_bytes - min([*saved.values(), *others])
