"""The serving mix that measures how KV pages lie in frames."""

import msgspec
import pytest

from eval import fragmentation
from eval.fragmentation import Mix, Outcome
from eval.page_rules import RULES


def run(monkeypatch: pytest.MonkeyPatch, rule: str) -> Outcome:
    monkeypatch.setattr(fragmentation, "TURNS_PER_ROW", 12)
    return Mix(rule, 6, 4).run()


@pytest.mark.parametrize("rule", RULES)
def test_the_same_seed_gives_the_same_figures(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    first, second = (
        msgspec.structs.replace(run(monkeypatch, rule), extend_microseconds=0) for _ in range(2)
    )
    assert first == second
    assert first.frames_gained > 0


def test_a_frame_costs_fewer_cached_pages_than_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    oldest, now = (run(monkeypatch, rule) for rule in ("oldest", "now"))
    assert now.pages_per_gain < oldest.pages_per_gain
    assert now.spread < oldest.spread
