"""Sizes as people write them."""

import pytest

from sglmoe.units import ceil_div, parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("123456", 123456),
        ("2k", 2000),
        ("2KiB", 2048),
        ("800 MB", 800_000_000),
        ("1.5GiB", 3 << 29),
        ("24gib", 24 << 30),
        ("1T", 10**12),
        ("80%", 800),
        ("12.5 %", 125),
        ("100%", 1000),
    ],
)
def test_sizes_and_shares_are_read(text: str, size_bytes: int) -> None:
    assert parse_bytes(text, whole_bytes=1000) == size_bytes


@pytest.mark.parametrize("text", ["", "lots", "-1GiB", "1.2.3G", "5 PiB", "GiB", "1e9"])
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match="write for example 24GiB"):
        parse_bytes(text, whole_bytes=1000)


@pytest.mark.parametrize("text", ["0", "0%", "0.0GiB", "101%"])
def test_no_memory_and_more_than_all_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no memory at all|not a share"):
        parse_bytes(text, whole_bytes=1000)


def test_sizes_are_shown_in_the_unit_that_fits() -> None:
    sizes = (0, 1023, 1536, 3 << 20, 24 << 30, 5 << 40)
    assert [show_bytes(size) for size in sizes] == [
        "0 B",
        "1023 B",
        "1.50 KiB",
        "3.00 MiB",
        "24.00 GiB",
        "5.00 TiB",
    ]


def test_ceil_div_rounds_up_only_what_is_not_whole() -> None:
    assert [ceil_div(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
