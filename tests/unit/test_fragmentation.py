"""The serving mix that measures how KV pages lie in frames: 4 requests at once, 6 pages in a frame."""

import msgspec
import pytest

from eval import fragmentation
from eval.fragmentation import Mix, Outcome


def run(rule: str) -> Outcome:
    return msgspec.structs.replace(Mix(rule, 6, 4).run(), extend_microseconds=0)


def test_a_frame_costs_fewer_cached_pages_than_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragmentation, "TURNS_PER_ROW", 8)
    oldest, now = run("oldest"), run("now")
    assert oldest.frames_gained > 0
    assert now.pages_per_gain < oldest.pages_per_gain
    assert now.spread < oldest.spread
    # The same seed, the same figures.
    assert run("now") == now
