"""What the store writes into a frame is what a layer sees in it: formats, frames and sizes drawn at random.

Whether it comes from the store, or from a block of host memory that was filled from there.
"""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglmoe.memory.arena import plan_geometry
from sglmoe.memory.expert_layout import (
    W4A16,
    BlockFp8,
    ExpertFormat,
    ExpertLayout,
    Plain,
    plan_layout,
)
from sglmoe.memory.host_tier import HostTier, TieredStore
from sglmoe.memory.promotion import Promotion
from sglmoe.memory.store import Bytes, ExpertStore
from sglmoe.worker.frame_views import FrameViews

NUM_EXPERTS = 3


@st.composite
def formats(draw: st.DrawFn) -> tuple[ExpertFormat, ExpertLayout]:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    plain = st.builds(Plain, st.sampled_from(["float32", "float16", "bfloat16"]))
    int4 = W4A16("float16", 2 * rows, draw(st.booleans()), "gptq")
    its = draw(st.one_of(plain, st.just(BlockFp8(rows, columns)), st.just(int4)))
    inner, hidden = 2 * rows * draw(st.integers(1, 4)), 2 * rows * draw(st.integers(1, 4))
    return its, plan_layout(its, hidden=hidden, inner=inner)


def filled_store(layout: ExpertLayout, random: np.random.Generator) -> ExpertStore:
    """Experts of any bits, their parts in the reverse of the frame's order."""
    store = ExpertStore()
    store.lay_out(layout.part_offsets())
    for expert in range(NUM_EXPERTS):
        for tensor in reversed(layout.tensors):
            for part in tensor.parts:
                part_bytes = tensor.num_bytes // len(tensor.parts)
                store.put(0, expert, part, random.integers(0, 256, part_bytes, np.uint8))
    return store


def stored(store: ExpertStore, layout: ExpertLayout, expert: int, name: str) -> Bytes:
    """A tensor's parts, one behind the other."""
    tensor = next(its for its in layout.tensors if its.name == name)
    arrays = [store._parts[0, expert, part] for part in tensor.parts]
    return np.concatenate([array for array in arrays if isinstance(array, np.ndarray)])


@settings(deadline=None)
@given(formats(), st.permutations(range(5)), st.booleans(), st.integers(0, 2**31))
def test_experts_are_seen_in_frames_as_they_were_stored(
    both: tuple[ExpertFormat, ExpertLayout], frames: list[int], has_padding: bool, seed: int
) -> None:
    its, layout = both
    store = filled_store(layout, np.random.default_rng(seed))
    assert store.expert_bytes() == layout.num_bytes
    geometry = plan_geometry(
        arena_bytes=5 * (layout.num_bytes + 512),
        expert_bytes=layout.num_bytes,
        token_bytes=64,
        token_rows=2,
        page_tokens=4,
        has_padding=has_padding,
    )
    arena = torch.full((geometry.arena_bytes,), 255, dtype=torch.uint8)
    arena = arena[geometry.padding_bytes :]
    rows = arena.numpy().reshape(-1, geometry.frame_bytes)
    views = FrameViews(arena, geometry, layout, its)
    tier = HostTier(np.full((1, layout.num_bytes), 255, np.uint8), num_layers=1, num_experts=3)
    block = tier.begin(Promotion(0, 1))
    assert block is not None
    tier.finish(block, store.read(0, 1, tier.blocks[block]))
    for expert in range(NUM_EXPERTS):
        TieredStore(tier, store).read(0, expert, rows[frames[expert]])
    for expert in range(NUM_EXPERTS):
        for name, view in views.tensors.items():
            seen = view[frames[expert]]
            assert seen.is_contiguous()
            bits = seen.reshape(-1).view(torch.uint8).numpy()
            assert np.array_equal(bits, stored(store, layout, expert, name))


def test_int4_matrices_are_what_the_parts_stand_for() -> None:
    """Gate 9 less 8, up 10 less 7 and tenfold, down 11 less 9, times a half. Frame 1 of 2."""
    its = W4A16("float16", 2, True, "gptq")
    layout = plan_layout(its, hidden=2, inner=2)
    store = ExpertStore()
    store.lay_out(layout.part_offsets())
    parts = (("w1", 0x99, 0x88, 1.0), ("w3", 0xAA, 0x77, 10.0), ("w2", 0xBB, 0x99, 0.5))
    for part, pair, zeros, scale in parts:
        store.put(0, 0, f"{part}_qweight", np.array([pair, pair], np.uint8))
        store.put(0, 0, f"{part}_qzeros", np.array([zeros], np.uint8))
        store.put(0, 0, f"{part}_scales", np.array([scale, scale], np.float16).view(np.uint8))
    arena = torch.zeros(512, dtype=torch.uint8)
    geometry = plan_geometry(
        arena_bytes=512,
        expert_bytes=layout.num_bytes,
        token_bytes=64,
        token_rows=2,
        page_tokens=4,
    )
    store.read(0, 0, arena.numpy().reshape(2, -1)[1])
    w13, w2 = FrameViews(arena, geometry, layout, its).matrices(1, torch.float16)
    assert w13.tolist() == [[1, 1], [1, 1], [30, 30], [30, 30]]
    assert w2.tolist() == [[1, 1], [1, 1]]
    assert w13.dtype == w2.dtype == torch.float16


def test_fp8_matrices_are_what_the_parts_stand_for() -> None:
    """Gate 1 and up 2, of which ups count tenfold; down 3, times a half. Frame 1 of 2."""
    its = BlockFp8(2, 2)
    layout = plan_layout(its, hidden=2, inner=2)
    store = ExpertStore()
    store.lay_out(layout.part_offsets())
    for part, value, scale in (("w1", 1, 1.0), ("w3", 2, 10.0), ("w2", 3, 0.5)):
        weight = torch.full((4,), value).to(torch.float8_e4m3fn)
        store.put(0, 0, part, weight.view(torch.uint8).numpy())
        scales = np.array([scale], np.float32).view(np.uint8)
        store.put(0, 0, f"{part}_weight_scale_inv", scales)
    geometry = plan_geometry(
        arena_bytes=512,
        expert_bytes=layout.num_bytes,
        token_bytes=64,
        token_rows=2,
        page_tokens=4,
    )
    arena = torch.zeros(geometry.arena_bytes, dtype=torch.uint8)
    store.read(0, 0, arena.numpy().reshape(2, -1)[1])
    w13, w2 = FrameViews(arena, geometry, layout, its).matrices(1, torch.bfloat16)
    assert w13.tolist() == [[1, 1], [1, 1], [20, 20], [20, 20]]
    assert w2.tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert w13.dtype == w2.dtype == torch.bfloat16
