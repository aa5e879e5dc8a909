"""Where each tensor of an expert lies in a frame."""

import math

from hypothesis import given
from hypothesis import strategies as st

from sglmoe.memory.expert_layout import (
    ALIGN_BYTES,
    W4A16,
    BlockFp8,
    ExpertFormat,
    ExpertLayout,
    Plain,
    plan_layout,
)


def places(layout: ExpertLayout) -> dict[str, tuple[str, tuple[int, int], int]]:
    return {its.name: (its.dtype, its.shape, its.offset) for its in layout.tensors}


def test_plain_weights_are_two_matrices() -> None:
    layout = plan_layout(Plain("bfloat16"), hidden=16, inner=8)
    assert places(layout) == {
        "w13_weight": ("bfloat16", (16, 16), 0),
        "w2_weight": ("bfloat16", (16, 8), 512),
    }
    assert layout.num_bytes == 768
    assert layout.part_offsets() == {"w1": 0, "w3": 256, "w2": 512}


def test_fp8_weights_have_their_scales_behind_them() -> None:
    """Gates and ups of 128 rows, in blocks of 128 x 128: two scales to a matrix's row of blocks, one below the other."""
    layout = plan_layout(BlockFp8(128, 128), hidden=256, inner=128)
    assert places(layout) == {
        "w13_weight": ("float8_e4m3fn", (256, 256), 0),
        "w2_weight": ("float8_e4m3fn", (256, 128), 65536),
        "w13_weight_scale_inv": ("float32", (2, 2), 98304),
        "w2_weight_scale_inv": ("float32", (2, 1), 98320),
    }
    assert layout.num_bytes == 98328
    assert layout.part_offsets() == {
        "w1": 0,
        "w3": 32768,
        "w2": 65536,
        "w1_weight_scale_inv": 98304,
        "w3_weight_scale_inv": 98312,
        "w2_weight_scale_inv": 98320,
    }
    assert layout.tensor_of("w3_weight_scale_inv").part_shape == (1, 2)


def test_weights_in_4_bits_have_scales_and_zeros_behind_them() -> None:
    """Two inputs to a byte, a scale for each 32 of them, and the zero points of two rows to a byte."""
    its = W4A16("bfloat16", 32, has_zeros=True, source="awq")
    layout = plan_layout(its, hidden=64, inner=32)
    assert places(layout) == {
        "w13_qweight": ("uint8", (64, 32), 0),
        "w2_qweight": ("uint8", (64, 16), 2048),
        "w13_scales": ("bfloat16", (64, 2), 3072),
        "w2_scales": ("bfloat16", (64, 1), 3328),
        "w13_qzeros": ("uint8", (32, 2), 3456),
        "w2_qzeros": ("uint8", (32, 1), 3520),
    }
    assert layout.num_bytes == 3552
    assert layout.tensor_of("w3_qzeros").part_shape == (16, 2)
    assert layout.part_offsets()["w3_qzeros"] == 3488
    symmetric = plan_layout(W4A16("float16", 32, False, "gptq"), hidden=64, inner=32)
    assert symmetric.num_bytes == 3456


def test_a_tensor_begins_where_16_divides() -> None:
    """The weights end at byte 360: their scales begin at 368. The last blocks of 20 columns are narrower than 16."""
    layout = plan_layout(BlockFp8(2, 16), hidden=20, inner=6)
    assert places(layout) == {
        "w13_weight": ("float8_e4m3fn", (12, 20), 0),
        "w2_weight": ("float8_e4m3fn", (20, 6), 240),
        "w13_weight_scale_inv": ("float32", (6, 2), 368),
        "w2_weight_scale_inv": ("float32", (10, 1), 416),
    }
    assert layout.num_bytes == 456


def test_an_expert_of_qwen3_30b_takes_half_of_its_bf16_and_a_kilobyte() -> None:
    in_bf16 = plan_layout(Plain("bfloat16"), hidden=2048, inner=768)
    in_fp8 = plan_layout(BlockFp8(128, 128), hidden=2048, inner=768)
    assert in_bf16.num_bytes == 9_437_184
    assert in_fp8.num_bytes == in_bf16.num_bytes // 2 + 1152


def test_in_4_bits_it_takes_a_quarter_and_for_each_128_weights_a_scale() -> None:
    """Three matrices of 12,288 groups: 2 bytes each, and in AWQ half a byte more."""
    in_gptq = plan_layout(W4A16("float16", 128, False, "gptq"), hidden=2048, inner=768)
    in_awq = plan_layout(W4A16("float16", 128, True, "awq"), hidden=2048, inner=768)
    assert in_gptq.num_bytes == 9_437_184 // 4 + 3 * 12_288 * 2
    assert in_awq.num_bytes == in_gptq.num_bytes + 3 * 12_288 // 2


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ExpertFormat, ExpertLayout]:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    plain = st.builds(Plain, st.sampled_from(["float32", "float16", "bfloat16"]))
    its = draw(st.one_of(plain, st.just(BlockFp8(rows, columns)), int4_formats()))
    if isinstance(its, W4A16):  # whole groups
        inner, hidden = (its.group * draw(st.integers(1, 5)) for _ in range(2))
    else:
        inner, hidden = rows * draw(st.integers(1, 9)), draw(st.integers(1, 50))
    return its, plan_layout(its, hidden=hidden, inner=inner)


def int4_formats() -> st.SearchStrategy[W4A16]:
    dtypes, groups = st.sampled_from(["float16", "bfloat16"]), st.sampled_from([2, 8, 32])
    return st.builds(W4A16, dtypes, groups, st.booleans(), st.just("awq"))


@given(layouts())
def test_parts_cover_tensors_and_tensors_follow_each_other(
    both: tuple[ExpertFormat, ExpertLayout],
) -> None:
    _, layout = both
    end = 0
    for tensor in layout.tensors:
        assert tensor.offset % ALIGN_BYTES == 0
        assert 0 <= tensor.offset - end < ALIGN_BYTES
        end = tensor.offset + tensor.num_bytes
        starts = [layout.part_offsets()[part] for part in tensor.parts]
        part_bytes = tensor.num_bytes // len(tensor.parts)
        assert starts == [tensor.offset + n * part_bytes for n in range(len(tensor.parts))]
        assert math.prod(tensor.part_shape) * len(tensor.parts) == math.prod(tensor.shape)
    assert layout.num_bytes == end
    offsets = list(layout.part_offsets().values())
    assert offsets == sorted(offsets)
