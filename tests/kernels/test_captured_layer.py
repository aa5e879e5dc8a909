"""A layer of a captured step, in the interpreter: what memory lends, what kernels make of it, and SGLang's sequence on that
have the bits of SGLang's own layer.

One layer of eight experts, as `test_layer` has it; all of them are in host memory, as they lie in a frame or packed.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from lent_steps import lent
from paged_layer import (
    AWQ,
    GPTQ,
    HIDDEN,
    NUM_EXPERTS,
    PLAIN,
    Layer,
    config,
    stand_ins,
    stock_layer,
)

from sglmoe.kernels.exponent_codec.encode import encode
from sglmoe.memory.expert_layout import BlockFp8, ExpertFormat
from sglmoe.memory.host_tier import HostTier, block_reader, make_blocks
from sglmoe.memory.mapped_files import Extent
from sglmoe.memory.packed_extent import PackedExtent
from sglmoe.memory.promotion import Promotion
from sglmoe.worker.captured_steps import CapturedSteps, captured_steps
from sglmoe.worker.routed import Routed
from sglmoe.worker.step_state import Sizes

MAX_ROWS, TOP_K = 4, 2
NO_EXPERT = 999  # what a router makes of a row without numbers
FP8 = BlockFp8(16, 32)  # an expert has to have a multiple of 16 bytes


@pytest.fixture(autouse=True)
def on_a_gpu() -> Iterator[None]:
    with stand_ins():
        yield


def filled_tier(layer: Layer) -> HostTier:
    """Every expert in a block that is not its number."""
    store = layer.experts.store
    its = {"as_stored": store.is_packed}
    blocks = make_blocks(2**20, store, **its)
    tier = HostTier(blocks, num_layers=1, num_experts=NUM_EXPERTS, **its)
    read = block_reader(tier, store)
    for expert in reversed(range(NUM_EXPERTS)):
        assert not tier.holds_all
        block = tier.begin(Promotion(0, expert, victim=None))
        assert block is not None
        tier.finish(block, read(0, expert, tier.blocks[block]))
    assert tier.holds_all
    return tier


def pack(layer: Layer, folder: Path) -> None:
    """All tensors but one of them."""
    path, store, offset = folder / "layer.packed", layer.experts.store, 0
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    for (_, expert, name), its in list(store._parts.items()):
        if (expert, name) == (5, "w3"):
            continue
        assert isinstance(its, np.ndarray)
        packed = encode(torch.from_numpy(its).view(torch.int16)).numpy()
        os.pwrite(descriptor, packed.tobytes(), offset)
        store._parts[0, expert, name] = PackedExtent(
            Extent(descriptor, offset, packed.nbytes, str(path)),
            xxhash.xxh3_64_intdigest(packed),
            Extent(-1, 0, its.nbytes, "none"),
        )
        offset += packed.nbytes


def steps_of(layer: Layer) -> CapturedSteps:
    return captured_steps(
        Sizes(1, NUM_EXPERTS, TOP_K, MAX_ROWS),
        layer.experts,
        layer.arena,
        layer.geometry.frame_bytes,
        memory=layer.memory,
        tier=filled_tier(layer),
        letters=None,
    )


@pytest.mark.parametrize("its", [PLAIN, FP8, GPTQ, AWQ], ids=["plain", "fp8", "gptq", "awq"])
@pytest.mark.parametrize(("num_frames", "num_rows"), [(2, 1), (6, 3)])
def test_lent_frames_give_the_stock_layers_bits(
    num_frames: int, num_rows: int, its: ExpertFormat
) -> None:
    compare_with_stock(Layer(num_frames, its), num_rows)


def test_experts_that_are_packed_in_host_memory_give_them_too(tmp_path: Path) -> None:
    layer = Layer(2)
    pack(layer, tmp_path)
    compare_with_stock(layer, 1)


def compare_with_stock(layer: Layer, num_rows: int) -> None:
    """Frames are as few as can be lent for so many rows; the step has four, and those that pad it get zeros, whatever is in
    them."""
    steps = steps_of(layer)
    random = torch.Generator().manual_seed(2)
    for _ in range(3):  # whatever is resident by now
        hidden = torch.randn(MAX_ROWS, HIDDEN, generator=random).bfloat16()
        weights, ids = torch.rand(MAX_ROWS, NUM_EXPERTS, generator=random).topk(TOP_K)
        ids = ids.to(torch.int32)
        stock = stock_layer(layer, hidden, weights, ids, inplace=True, filter_expert=False)
        hidden[num_rows:], weights[num_rows:] = torch.nan, torch.nan
        layer.memory.begin_step()
        with lent(steps, num_rows) as is_lent:
            assert is_lent
            chosen = ids.clone()
            chosen[num_rows:] = NO_EXPERT
            routing = Routed(0, chosen, torch.empty(0), hidden)
            output = steps.compute(routing, weights, config=config(None))
            steps.queued()
        assert torch.equal(output[:num_rows], stock[:num_rows])
        assert not output[num_rows:].any()
        assert torch.equal(steps.routing()[0], ids[:num_rows])
        resident = np.flatnonzero(layer.memory.frame_table[0] >= 0)
        assert set(ids[:num_rows].unique().tolist()) <= set(resident.tolist())
        assert layer.memory.violations() == []
    snapshot = layer.memory.snapshot(0)
    assert snapshot.expert_misses > 0
    assert snapshot.num_waves == 0


def test_what_memory_cant_lend_is_left_to_waves() -> None:
    layer = Layer(3)
    steps = steps_of(layer)
    for num_rows, can_lend in [(1, True), (2, False), (MAX_ROWS + 1, False)]:
        layer.memory.begin_step()
        with lent(steps, num_rows) as is_lent:
            assert is_lent == can_lend
        assert layer.memory.violations() == []
