"""The terminal's picture, letter by letter."""

import re

import pytest
from msgspec.structs import replace
from rich.console import Console
from states import STATE, large_map

from sglmoe.live_view.picture import block, experts, picture, shares_of, show_seconds, squeeze
from sglmoe.live_view.state import LiveState


def drawn(state: LiveState, *, width: int = 100, kv_shares: tuple[float, ...] = ()) -> list[str]:
    console = Console(width=width, record=True, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(picture(state, width=width, kv_shares=kv_shares))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_figures_have_units_and_what_is_not_known_is_a_dash() -> None:
    lines = drawn(STATE)
    assert lines[0] == "sglmoe  tiny-moe  up 12 min  worker running"
    assert (
        " ".join(lines[1].split()) == "output 123.4 tok/s running 3 expert hits 93.1 % prefetch on"
    )
    assert "waiting 3" in " ".join(lines[2].split())
    assert "since start 90.0 %" in " ".join(lines[2].split())
    assert "precision 62.5 %" in " ".join(lines[2].split())
    assert "moved 2.00 KiB/s" in " ".join(lines[3].split())
    at_rest = drawn(replace(STATE, rates=None))
    assert at_rest[1].split()[:3] == ["output", "-", "running"]
    assert " ".join(at_rest[3].split()) == "busy - limit 16 stalled - moved -"


def test_the_arena_is_a_bar_and_a_map() -> None:
    lines = drawn(STATE, width=80, kv_shares=(0.0, 0.5, 1.0))
    assert "Arena 8.00 KiB: 8 frames of 1.00 KiB; KV of 20 tokens in use, 8 cached" in lines
    assert "e" * 40 + "k" * 30 + "." * 10 in lines
    assert "KV so far ▁▅█" in lines
    assert "eeelkkc." in lines
    assert any(
        line.startswith("e experts 3  l on their way 1  p packed experts 0  k KV of running")
        for line in lines
    )


def test_packed_experts_have_their_part_of_both() -> None:
    assert STATE.map is not None
    memory = replace(STATE.memory, expert_frames=3, packed_frames=1)
    its_map = replace(STATE.map, frames="eelpkkc.", residency=("rr.p", "ral."))
    lines = drawn(replace(STATE, memory=memory, map=its_map), width=80)
    assert "e" * 30 + "p" * 10 + "k" * 30 + "." * 10 in lines
    assert "eelpkkc." in lines
    assert any("packed in a frame 1" in line for line in lines)


def test_experts_are_blocks_as_high_as_their_heat() -> None:
    lines = drawn(STATE)
    assert "   0 █▁▅▁" in lines
    assert "   1 ▁▁█▁" in lines
    assert any("in a frame 3" in line and "there ahead of use 1" in line for line in lines)


def test_a_block_of_several_experts_is_as_high_as_the_hottest() -> None:
    assert STATE.map is not None
    narrow = experts(STATE.map, width=7).plain.splitlines()
    assert narrow[-2:] == ["   0 █▅", "   1 ▁█"]


def test_a_large_arena_and_many_experts_fit_the_screen() -> None:
    state = replace(STATE, map=large_map(num_frames=10_000, num_layers=48, num_experts=128))
    lines = drawn(state, width=80)
    assert len(lines) < 50
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if re.match(r" +[0-9]+ [▁-█]{64}$", line)]
    assert len(rows) == 24, "two layers a row, two experts a block"


def test_a_lost_worker_is_told_with_its_cause() -> None:
    worker = replace(
        STATE.worker, state="restarting", lost_seconds=1.25, cause="a\nkilled: SIGKILL"
    )
    lines = drawn(replace(STATE, worker=worker, map=None))
    assert lines[0].endswith("worker restarting for 1.2 s")
    assert lines[1] == "killed: SIGKILL"
    assert lines[-1].startswith("no map")
    worker = replace(STATE.worker, restarts=2, restart_seconds=0.75)
    assert drawn(replace(STATE, worker=worker))[0].endswith("restarts 2, the last took 0.8 s")


def test_a_dense_model_has_no_experts() -> None:
    assert STATE.map is not None
    dense = replace(STATE.map, residency=(), heat=())
    assert "No experts: a dense model" in drawn(replace(STATE, map=dense))


@pytest.mark.parametrize(
    ("letters", "cells", "expected"),
    [("eek", 3, "eek"), ("eekk..", 3, "ek."), ("eekk.", 2, "ek"), ("", 3, "")],
)
def test_squeezed_letters_are_the_most_common_ones(letters: str, cells: int, expected: str) -> None:
    assert squeeze(letters, cells) == expected


def test_no_cell_is_lost() -> None:
    for counts in ([1, 1, 1], [7, 0, 3], [0, 0, 0], [997, 2, 1]):
        cells = shares_of(counts, 100)
        assert min(cells) >= 0
        assert sum(cells) == (100 if sum(counts) else 0)
    assert (block(0), block(0.99), block(1)) == ("▁", "█", "█")


def test_times() -> None:
    assert [show_seconds(s) for s in (0.84, 59.9, 61, 7199, 7200)] == [
        "0.8 s",
        "59.9 s",
        "1 min",
        "119 min",
        "2 h",
    ]
