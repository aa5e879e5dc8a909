"""Packing and unpacking bf16 bits, whatever they are: the same bits come back, and never much more room is taken."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sglmoe.demo_model import DEMO_MODEL
from sglmoe.kernels.exponent_codec.decode_cpu import TileDecoder, decode
from sglmoe.kernels.exponent_codec.encode import TILES_AT_ONCE, encode
from sglmoe.kernels.exponent_codec.layout import (
    TILE_BYTES,
    TILE_VALUES,
    Bytes,
    Form,
    Layout,
    PackedError,
    max_packed_bytes,
    read_layout,
)
from sglmoe.kernels.exponent_codec.reference import decode_reference

PROFILE = settings(max_examples=80, deadline=None, derandomize=True, database=None)
# Where gathering tiles ends, and where tiles do.
SIZES = st.one_of(
    st.integers(0, 20),
    st.integers(TILE_VALUES - 2, TILE_VALUES + 2),
    st.integers(3 * TILE_VALUES - 1, 3 * TILE_VALUES + 1),
)


def pack(values: np.ndarray) -> Bytes:
    """`values`: uint16."""
    return encode(torch.from_numpy(values.view(np.int16).copy())).numpy()


def check_comes_back(values: np.ndarray) -> Layout:
    """By both decoders, within the bound; the layout of the packed tensor."""
    packed = pack(values)
    layout = read_layout(packed)
    assert packed.nbytes == layout.nbytes <= max_packed_bytes(values.size)
    target = np.full(values.nbytes, 170, np.uint8)
    decode(packed, target)
    assert target.tobytes() == values.tobytes()
    assert decode_reference(packed).tobytes() == values.tobytes()
    return layout


def gaussian(num_values: int, seed: int = 0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_values, generator=generator) * 0.02
    return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


# -------------------------------------------------------------------------------------- bit for bit


def every_value() -> np.ndarray:
    """Both zeros, subnormals, infinities, every NaN with its payload; a tile has eight exponents and both signs."""
    every = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    return every[np.argsort(every & 0x7FFF, kind="stable")]


def test_every_value_there_is_comes_back_from_its_code() -> None:
    assert check_comes_back(every_value()) == Layout(2**16, 0, Form.CODED)


def test_every_value_there_is_comes_back_as_an_escape() -> None:
    """One among seven whose exponents are far from its own."""
    values = np.repeat(every_value(), 8)
    is_low = (values >> 7 & 255) < 128
    filling = np.where(is_low, np.uint16(254 << 7), np.uint16(3 << 7))
    values = np.where(np.arange(values.size) % 8 == 0, values, filling)
    layout = check_comes_back(values)
    assert layout.form is Form.CODED
    assert layout.num_escapes == 2**16


def test_every_value_there_is_comes_back_raw() -> None:
    shuffled = np.random.default_rng(0).permutation(every_value())
    assert check_comes_back(shuffled) == Layout(2**16, 0, Form.RAW)


@given(st.data())
@PROFILE
def test_any_bits_come_back(data: st.DataObject) -> None:
    size = data.draw(SIZES)
    check_comes_back(data.draw(arrays.arrays(np.uint16, size)))


@given(
    size=SIZES, base=st.integers(0, 255), spread=st.integers(1, 40), seed=st.integers(0, 2**32 - 1)
)
@PROFILE
def test_values_of_few_exponents_come_back_wherever_those_lie(
    size: int, base: int, spread: int, seed: int
) -> None:
    """From coded without an escape to raw; at both ends of the range of exponents, where a window would leave it."""
    rng = np.random.default_rng(seed)
    exponents = np.minimum(255, base + rng.geometric(1 / spread, size) - 1).astype(np.uint16)
    check_comes_back((exponents << 7) | (rng.integers(0, 2**16, size, np.uint16) & 0x807F))


def test_more_tiles_than_are_packed_at_once_come_back() -> None:
    layout = check_comes_back(gaussian((TILES_AT_ONCE + 1) * TILE_VALUES + 7))
    assert layout.form is Form.CODED
    assert layout.num_tiles == TILES_AT_ONCE + 2


def test_the_demo_models_weights_come_back_smaller() -> None:
    from safetensors.torch import load_file

    tensors = load_file(DEMO_MODEL / "model.safetensors")
    experts = [its for name, its in tensors.items() if ".experts." in name]
    assert len(experts) == 6 * 32 * 3
    packed_bytes = 0
    for tensor in experts[::7]:
        values = tensor.reshape(-1).view(torch.int16).numpy().view(np.uint16)
        packed_bytes += check_comes_back(values).nbytes
    assert packed_bytes <= 0.72 * sum(its.nbytes for its in experts[::7])


# --------------------------------------------------------------------------------------------- size


def test_gaussian_weights_take_at_most_72_percent() -> None:
    values = gaussian(64 * TILE_VALUES)
    packed = pack(values)
    assert 0.69 < packed.nbytes / values.nbytes <= 0.72


def test_an_escape_takes_three_bytes_and_a_tile_2816() -> None:
    """Eight exponents have codes; the two values with a ninth do not."""
    values = (np.arange(TILE_VALUES, dtype=np.uint16) % 8 + 100) << 7
    assert check_comes_back(values) == Layout(TILE_VALUES, 0, Form.CODED)
    values[[5, 2047]] = 99 << 7
    layout = check_comes_back(values)
    assert layout == Layout(TILE_VALUES, 2, Form.CODED)
    packed = pack(values)
    assert packed[layout.base] == 100
    assert packed[layout.escape_position :][:4].tolist() == [5, 0, 255, 7]
    assert packed[layout.escape_exponent :][:2].tolist() == [99, 99]
    sections = [layout.first_escape, layout.base, layout.escape_position, layout.escape_exponent]
    assert [*sections, layout.tiles, layout.nbytes] == [16, 32, 48, 64, 80, 80 + TILE_BYTES]


def test_what_fills_the_last_tile_up_takes_no_escapes() -> None:
    """It is filled up with the last value, which here has a rare exponent."""
    values = (np.arange(TILE_VALUES + 1500, dtype=np.uint16) % 8 + 100) << 7
    values[-1] = 200 << 7
    assert check_comes_back(values) == Layout(values.size, 1, Form.CODED)


def test_the_window_lies_where_most_values_are() -> None:
    """Not at the largest exponent, nor around the most frequent one; and each tile has its own."""
    counts = {40: 300, **dict.fromkeys(range(90, 98), 200), 200: 148}
    first_tile = np.repeat(np.uint16([*counts]), [*counts.values()])
    values = np.concatenate([first_tile, np.full(TILE_VALUES, 255, np.uint16)]) << 7
    packed = pack(values)
    layout = check_comes_back(values)
    assert packed[layout.base :][:2].tolist() == [90, 248]
    assert layout.num_escapes == 300 + 148


def test_what_would_not_get_smaller_is_stored_as_it_is() -> None:
    noise = np.random.default_rng(0).integers(0, 2**16, 3 * TILE_VALUES, np.uint16)
    packed = pack(noise)
    assert read_layout(packed).form is Form.RAW
    assert packed.nbytes == noise.nbytes + 16
    assert pack(gaussian(1)).nbytes == 32


# ---------------------------------------------------------------------------------- damaged and odd


def test_tiles_decode_on_their_own() -> None:
    values = gaussian(5 * TILE_VALUES - 3)
    packed = pack(values)
    layout = read_layout(packed)
    decoder = TileDecoder(layout, packed[: layout.tiles])
    tiles = packed[layout.tiles :].reshape(-1, TILE_BYTES)
    for first, stop in ((3, 5), (1, 2), (0, 1)):
        its_values = values[first * TILE_VALUES : stop * TILE_VALUES]
        target = np.zeros(its_values.nbytes, np.uint8)
        decoder.decode(first, tiles[first:stop].reshape(-1), target)
        assert target.tobytes() == its_values.tobytes()


def damaged(offset: int, new: bytes) -> Bytes:
    values = (np.arange(TILE_VALUES, dtype=np.uint16) % 8 + 100) << 7
    values[[5, 2047]] = 99 << 7
    packed = pack(values).copy()
    packed[offset : offset + len(new)] = list(new)
    return packed


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (damaged(12, b"\x07"), "form 7, which this version does not know"),
        (damaged(1, b"\x09"), "bytes where the header says"),
        (damaged(0, b"")[:-1], "bytes where the header says"),
        (damaged(0, b"")[:9], "9 bytes are no packed tensor"),
        (damaged(50, b"\x00\x08"), "outside of its tiles"),  # position 2048
        (damaged(20, b"\x03"), "outside of its tiles"),  # a third escape
        (damaged(16, b"\x03"), "outside of its tiles"),  # ends before it begins
    ],
)
def test_damage_that_would_lead_astray_is_an_error(packed: Bytes, message: str) -> None:
    with pytest.raises(PackedError, match=message):
        decode(packed, np.zeros(2 * TILE_VALUES, np.uint8))


def test_a_target_of_another_size_is_an_error() -> None:
    with pytest.raises(PackedError, match="2048 values do not fit 4094 bytes"):
        decode(damaged(0, b""), np.zeros(2 * TILE_VALUES - 2, np.uint8))
