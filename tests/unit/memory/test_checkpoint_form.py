"""What GPTQ and AWQ checkpoints have is what a frame has, weight for weight. That these are SGLang's bits:
`tests/kernels/test_int4.py`."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_packing import Int4Weights

from sglmoe.memory.checkpoint_form import (
    awq_weights,
    awq_zeros,
    checkpoint_form,
    gptq_weights,
    gptq_zeros,
    scales,
)
from sglmoe.memory.expert_layout import W4A16, BlockFp8, Plain, plan_layout
from sglmoe.memory.store import Bytes


def raw(*words: int) -> Bytes:
    return np.array(words, np.uint32).view(np.uint8)


def test_gptq_has_eight_inputs_of_a_row_in_a_word() -> None:
    """Rows 0 and 1 of weights, eight inputs each: the first input is in the lowest bits, here and there."""
    assert gptq_weights(raw(0x76543210, 0xFEDCBA98), width=2).tolist() == [
        *(0x10, 0x32, 0x54, 0x76),
        *(0x98, 0xBA, 0xDC, 0xFE),
    ]


def test_awq_has_eight_rows_of_an_input_in_a_word_the_even_ones_first() -> None:
    """Two inputs, eight rows: row 1 of either lies behind row 6. A row's two inputs come together in one byte."""
    first, second = raw(0x7531_6420), raw(0xFDB9_ECA8)
    pairs = awq_weights(np.concatenate([first, second]), width=8)
    assert pairs.tolist() == [0x80, 0x91, 0xA2, 0xB3, 0xC4, 0xD5, 0xE6, 0xF7]


def test_zero_points_of_two_rows_share_a_byte_and_gptqs_are_less_by_one() -> None:
    """One group, eight rows with zero points 1 to 8; a second group in which all are 15 but the last."""
    assert gptq_zeros(raw(0x76543210, 0x0EEEEEEE), width=8).tolist() == [
        *(0x21, 0xFF),
        *(0x43, 0xFF),
        *(0x65, 0xFF),
        *(0x87, 0x1F),
    ]
    assert awq_zeros(raw(0x8642_7531), width=8).tolist() == [0x21, 0x43, 0x65, 0x87]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("to", ["float16", "bfloat16"])
def test_scales_are_turned_and_rounded_as_torch_rounds(dtype: str, to: str) -> None:
    """From 1e-7, which float16 has hardly, to 1e5, which it has not; ties to even among them."""
    random = torch.Generator().manual_seed(1)
    values = torch.rand(40, 6, generator=random) * 10.0 ** torch.randint(
        -7, 6, (40, 6), generator=random
    )
    values[0] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 0, 1])
    values = values.to(getattr(torch, dtype))
    converted = scales(values.view(torch.uint8).numpy().reshape(-1), width=6, dtype=dtype, to=to)
    assert torch.equal(
        torch.from_numpy(converted).view(getattr(torch, to)).view(6, 40),
        values.T.to(getattr(torch, to)),
    )


@st.composite
def weights(draw: st.DrawFn) -> Int4Weights:
    """Rows and inputs by eights, as words need them; zero points that GPTQ can write, 1 to 15."""
    n, groups, group = (
        8 * draw(st.integers(1, 20)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([8, 16])),
    )
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(0, 16, (n, groups * group), generator=random)
    zeros = torch.randint(1, 16, (n, groups), generator=random)
    return Int4Weights(values, torch.rand(n, groups, generator=random).half(), zeros)


@settings(deadline=None)
@given(weights(), st.sampled_from(["gptq", "awq"]))
def test_a_frame_has_the_weights_that_the_checkpoint_has(its: Int4Weights, source: str) -> None:
    """A down projection `[n, k]`; its tensors in the checkpoint have the shapes that are asked for."""
    n, k = its.values.shape
    form = W4A16("float16", its.group, True, source)  # type: ignore[arg-type]
    tensors = {tensor.name: tensor for tensor in plan_layout(form, hidden=n, inner=k).tensors}
    checkpoint = its.in_gptq() if source == "gptq" else its.in_awq()
    found = {}
    for what in ("qweight", "scales", "qzeros"):
        tensor = tensors[f"w2_{what}"]
        dtype = str(checkpoint[what].dtype).removeprefix("torch.")
        asked = checkpoint_form(form, tensor, dtype)
        assert tuple(checkpoint[what].shape) == asked.shape
        assert asked.dtype in (None, dtype)
        assert asked.convert is not None
        given_bytes = checkpoint[what].reshape(-1).view(torch.uint8).numpy()
        before = given_bytes.copy()
        converted = asked.convert(given_bytes)
        assert np.array_equal(given_bytes, before)  # they may be a mapped file's
        assert converted.nbytes == tensor.part_bytes
        found[what] = torch.from_numpy(converted).view(getattr(torch, tensor.dtype))
    pairs, zeros = found["qweight"].view(n, k // 2), found["qzeros"].view(n // 2, -1)
    assert torch.equal(torch.stack((pairs & 15, pairs >> 4), 2).view(n, k), its.values)
    assert torch.equal(torch.stack((zeros & 15, zeros >> 4), 1).view(n, -1), its.zeros)
    assert torch.equal(found["scales"].view(n, -1), its.scales)


@pytest.mark.parametrize("its", [Plain("bfloat16"), BlockFp8(8, 8)])
def test_other_formats_lie_in_a_checkpoint_as_in_a_frame(its: Plain | BlockFp8) -> None:
    for tensor in plan_layout(its, hidden=16, inner=8).tensors:
        form = checkpoint_form(its, tensor, "float32")
        assert (form.shape, form.dtype, form.convert) == (tensor.part_shape, None, None)
