"""Traces of a tiny model: 2 layers of 4 experts, top 2, 11 token ids."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Geometry
from sglmoe.prediction.trace import FORMAT_VERSION, Totals, Trace, TraceInfo

NUM_LAYERS, NUM_EXPERTS, TOP_K, VOCAB_SIZE = 2, 4, 2, 11

Row = tuple[int, int, Sequence[int]]  # request, position of the first, token ids


def experts_of(token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """The tiny model's rule: token t takes experts t and t + 1, in the second layer one further."""
    layers = np.arange(NUM_LAYERS)[:, np.newaxis]
    chosen = token_ids[:, np.newaxis, np.newaxis] + layers + np.arange(TOP_K)
    experts: npt.NDArray[np.uint8] = (chosen % NUM_EXPERTS).astype(np.uint8)
    return experts


def trace_of(steps: Sequence[Sequence[Row]], *, model: str = "tiny") -> Trace:
    rows = [row for step in steps for row in step]
    token_ids = np.array([token for _, _, tokens in rows for token in tokens], np.int32)
    lengths = [len(tokens) for _, _, tokens in rows]
    num_requests = 1 + max(owner for owner, _, _ in rows)
    return Trace(
        info=info_of(model),
        operations=np.empty((0, 5), np.int32),
        request_tokens=np.empty(0, np.int32),
        request_bounds=np.zeros(num_requests + 1, np.int64),
        token_ids=token_ids,
        positions=np.concatenate(
            [np.arange(first, first + len(tokens)) for _, first, tokens in rows]
        ).astype(np.int32),
        owners=np.repeat([owner for owner, _, _ in rows], lengths).astype(np.int32),
        expert_ids=experts_of(token_ids),
        probabilities=np.full((len(token_ids), NUM_LAYERS, NUM_EXPERTS), 0.25, np.float16),
        step_bounds=np.cumsum([0, *(sum(len(row[2]) for row in step) for step in steps)]),
        step_seconds=np.zeros(len(steps), np.float32),
    )


def info_of(model: str) -> TraceInfo:
    geometry = Geometry(
        num_frames=8,
        frame_bytes=1000,
        expert_bytes=1000,
        page_bytes=500,
        page_tokens=4,
        pages_per_frame=2,
        page_rows=16,
    )
    return TraceInfo(
        version=FORMAT_VERSION,
        model=model,
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        geometry=geometry,
        floor_frames=1,
        policy=MemoryPolicy.LRU,
        expert_ratio=0.0,
        totals=Totals(*[0] * len(Totals.__struct_fields__)),
        namespaces=[],
    )


def random_trace(num_requests: int, seed: int, *, model: str = "tiny") -> Trace:
    """Two requests at a time, each with a prompt of 3 to 6 tokens and then 4 to 8 generated ones."""
    rng = np.random.default_rng(seed)
    steps: list[list[Row]] = []
    for first in range(0, num_requests, 2):
        pair = range(first, min(first + 2, num_requests))
        prompts = {owner: int(rng.integers(3, 7)) for owner in pair}
        ends = {owner: prompts[owner] + int(rng.integers(4, 9)) for owner in pair}
        texts = {owner: rng.integers(0, VOCAB_SIZE, prompts[owner]).tolist() for owner in pair}
        steps.append([(owner, 0, text) for owner, text in texts.items()])
        for done in range(9):
            step: list[Row] = [
                (o, prompts[o] + done, [int(rng.integers(0, VOCAB_SIZE))])
                for o in pair
                if prompts[o] + done < ends[o]
            ]
            steps += [step] if step else []
    return trace_of(steps, model=model)
