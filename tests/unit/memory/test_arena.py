"""How a budget becomes frames and pages."""

import pytest

from sglmoe.memory.arena import (
    FrameKind,
    Frames,
    Geometry,
    arena_bytes_within,
    plan_floor,
    plan_geometry,
)


def test_frame_is_one_expert_in_whole_pages() -> None:
    # Qwen3-30B-A3B in bf16: an expert is 3 x 2048 x 768, a token of KV 48 x 2 x 4 x 128.
    geometry = plan_geometry(
        arena_bytes=24 * 2**30,
        expert_bytes=2048 * 768 * 3 * 2,
        token_bytes=48 * 2 * 4 * 128 * 2,
        token_rows=48 * 2,
        page_tokens=None,
    )
    # The expert happens to be exactly 96 tokens, so the largest page wastes nothing.
    assert geometry == Geometry(
        num_frames=2730,
        frame_bytes=9_437_184,
        expert_bytes=9_437_184,
        page_bytes=16 * 98_304,
        page_tokens=16,
        pages_per_frame=6,
        page_rows=2 * 48 * 16,
    )
    assert geometry.arena_bytes == 2730 * 9_437_184


@pytest.mark.parametrize(
    ("expert_tokens", "page_tokens"),
    [(1600, 16), (200, 8), (51, 4), (50, 2), (49, 1), (15, 1)],
)
def test_largest_page_that_wastes_under_two_percent(expert_tokens: int, page_tokens: int) -> None:
    geometry = plan_geometry(
        arena_bytes=2**30,
        expert_bytes=expert_tokens * 256,
        token_bytes=256,
        token_rows=4,
        page_tokens=None,
    )
    assert geometry.page_tokens == page_tokens


def test_when_every_page_size_wastes_much_the_least_wasteful_is_taken() -> None:
    # An expert of 2.5 tokens: pages of 1 token waste a sixth, larger pages more.
    geometry = plan_geometry(
        arena_bytes=2**20, expert_bytes=640, token_bytes=256, token_rows=4, page_tokens=None
    )
    assert (geometry.page_tokens, geometry.pages_per_frame) == (1, 3)


def test_page_size_can_be_prescribed() -> None:
    geometry = plan_geometry(
        arena_bytes=2**20, expert_bytes=640, token_bytes=256, token_rows=4, page_tokens=64
    )
    assert (geometry.page_tokens, geometry.pages_per_frame, geometry.page_rows) == (64, 1, 256)


def test_frames_start_aligned_even_if_pages_do_not() -> None:
    # Tensor cores and vector loads want w13 at a multiple of 256 bytes; pages are 96 bytes here.
    geometry = plan_geometry(
        arena_bytes=2**20, expert_bytes=1000, token_bytes=96, token_rows=2, page_tokens=1
    )
    assert (geometry.pages_per_frame, geometry.frame_bytes) == (16, 1536)


def test_dense_model_has_frames_of_about_a_mebibyte() -> None:
    geometry = plan_geometry(
        arena_bytes=2**30, expert_bytes=0, token_bytes=768, token_rows=6, page_tokens=None
    )
    assert (geometry.page_tokens, geometry.pages_per_frame) == (16, 86)
    assert geometry.frame_bytes == 86 * 16 * 768


@pytest.mark.parametrize("has_padding", [False, True])
def test_token_ids_stay_within_int32(has_padding: bool) -> None:
    # 64 GiB of 16-byte rows would be 2**32 ids: the arena is cut where they run out.
    geometry = plan_geometry(
        arena_bytes=2**36,
        expert_bytes=2**20,
        token_bytes=64,
        token_rows=4,
        page_tokens=16,
        has_padding=has_padding,
    )
    assert geometry.num_frames == 2**15 - has_padding
    num_pages = geometry.num_frames * geometry.pages_per_frame
    assert 2**31 - 2**16 <= geometry.first_id + num_pages * geometry.page_rows <= 2**31


def test_rows_that_pad_a_batch_have_pages_in_front_of_the_frames() -> None:
    # A page of 96 bytes: behind 8 of them a frame is aligned again. They are no part of any frame.
    geometry = plan_geometry(
        arena_bytes=768 + 5 * 1536 + 1535,
        expert_bytes=1000,
        token_bytes=96,
        token_rows=2,
        page_tokens=1,
        has_padding=True,
    )
    assert (geometry.padding_pages, geometry.padding_bytes, geometry.num_frames) == (8, 768, 5)
    assert geometry.arena_bytes == 768 + 5 * 1536
    # Where page 0 begins, in rows of 48 bytes; SGLang's padding writes to row 0.
    assert geometry.first_id * 48 == geometry.padding_bytes


def test_what_graphs_take_is_of_the_budget() -> None:
    assert arena_bytes_within(1000, 300, decoding_bytes=20, graph_bytes=7) == 673
    with pytest.raises(ValueError, match=r"and CUDA graphs 700 B, of the 1000 B budget"):
        arena_bytes_within(1000, 300, graph_bytes=700)


def frames_kept(num_frames: int, context_tokens: int | None, num_experts: int = 8) -> int:
    """In frames of 4 pages of 16 tokens, of experts of three layers, 2 of each for a token."""
    geometry = plan_geometry(
        arena_bytes=1024 * num_frames,
        expert_bytes=1024,
        token_bytes=16,
        token_rows=4,
        page_tokens=16,
    )
    assert (geometry.num_frames, geometry.pages_per_frame) == (num_frames, 4)
    return plan_floor(
        geometry, num_layers=3, num_experts=num_experts, top_k=2, context_tokens=context_tokens
    )


def test_experts_keep_the_frames_of_one_token_in_a_layer() -> None:
    assert frames_kept(100, None) == 2
    assert frames_kept(100, None, num_experts=0) == 0


def test_for_steps_without_the_host_they_keep_those_of_all_layers_beside_a_whole_context() -> None:
    """3 layers of 2, and 3 frames for 129 to 192 tokens; one frame less, and there is the usual floor."""
    assert frames_kept(9, 192) == frames_kept(9, 129) == 6
    assert frames_kept(8, 192) == 2
    assert frames_kept(9, 193) == 2
    assert frames_kept(8, 128) == 6
    assert frames_kept(9, 192, num_experts=0) == 0
    assert frames_kept(6, 192, num_experts=1) == 3  # no layer has two


@pytest.mark.parametrize("expert_bytes", [2**20, 0])
def test_too_small_an_arena_names_numbers_and_flag(expert_bytes: int) -> None:
    with pytest.raises(
        ValueError, match=r"leaves 512\.00 KiB .*raise --memory-budget by at least \d.* [MK]iB"
    ):
        plan_geometry(
            arena_bytes=2**19,
            expert_bytes=expert_bytes,
            token_bytes=1024,
            token_rows=4,
            page_tokens=None,
        )


def test_frames_change_hands_and_are_counted() -> None:
    frames = Frames(4)
    assert frames.take_for_expert(1, 3) == 0
    assert frames.take_for_kv() == 1
    assert frames.expert(0) == (1, 3)
    assert (frames.num_free, frames.num_expert, frames.num_kv) == (2, 1, 1)
    frames.give(0)
    # Given back last, taken first: its bytes are the warmest.
    assert frames.take_for_kv() == 0
    assert frames.kind(0) is FrameKind.KV
    assert (frames.num_free, frames.num_expert, frames.num_kv) == (2, 0, 2)
    assert frames.violations() == []


def test_packed_frames_are_a_kind_of_their_own() -> None:
    frames = Frames(3)
    assert frames.take_for_packed() == 0
    frames.take_for_kv()
    assert frames.kind(0) is FrameKind.PACKED
    assert (frames.num_free, frames.num_packed, frames.num_kv) == (1, 1, 1)
    frames.give(0)
    assert (frames.num_free, frames.num_packed, frames.num_kv) == (2, 0, 1)
    assert frames.violations() == []


def test_frames_go_straight_to_experts_whoever_had_them() -> None:
    frames = Frames(4)
    frames.take_for_expert(0, 1)
    frames.assign({0: (0, 2), 2: (1, 3)})
    assert frames.expert(0) == (0, 2)
    assert frames.expert(2) == (1, 3)
    assert (frames.num_free, frames.num_expert) == (2, 2)
    assert frames.violations() == []


def test_lent_frames_are_free_again_as_they_were() -> None:
    frames = Frames(5)
    frames.take_for_kv()
    assert frames.lend(3) == [1, 2, 3]
    assert (frames.num_free, frames.num_kv) == (1, 1)
    assert frames.take_for_expert(0, 0) == 4  # a prefetch's
    assert frames.violations() == []
    frames.end_lending()
    assert (frames.num_free, frames.num_kv) == (3, 1)
    assert frames.take_for_kv() == 1
    assert frames.violations() == []


def test_while_frames_are_lent_others_do_not_change_hands() -> None:
    frames = Frames(3)
    frame = frames.take_for_kv()
    frames.lend(0)
    for attempt in (
        frames.take_for_kv,
        frames.take_for_packed,
        lambda: frames.give(frame),
        lambda: frames.lend(1),
        lambda: frames.assign({1: (0, 0)}),
    ):
        with pytest.raises(AssertionError):
            attempt()
    assert frames.violations() == []


def test_giving_a_frame_back_twice_is_caught() -> None:
    frames = Frames(2)
    frame = frames.take_for_kv()
    frames.give(frame)
    with pytest.raises(AssertionError, match="given back twice"):
        frames.give(frame)
