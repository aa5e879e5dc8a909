"""What decoding takes, as a share of what loading takes."""

import pytest

from sglmoe.memory.decode_ratio import DecodeRatio


def test_nothing_is_worth_packing_until_both_were_measured() -> None:
    ratio = DecodeRatio()
    assert ratio() == 1
    ratio.note(0.001, is_decoded=True)
    assert ratio() == 1
    ratio.note(0.004, is_decoded=False)
    assert ratio() == 0.25


def test_means_follow_what_is_measured() -> None:
    ratio = DecodeRatio()
    ratio.note(0.001, is_decoded=True)
    ratio.note(0.004, is_decoded=False)
    for _ in range(64):
        ratio.note(0.010, is_decoded=False)
    assert ratio() == pytest.approx(0.1, rel=0.01)


def test_decoding_never_seems_to_cost_more_than_loading() -> None:
    ratio = DecodeRatio()
    ratio.note(0.004, is_decoded=True)
    ratio.note(0.001, is_decoded=False)
    assert ratio() == 1
