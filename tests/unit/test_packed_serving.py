"""What is made of rounds of the benchmark of packed experts in servers."""

import json
import os
from pathlib import Path
from typing import Any

from eval.memory_timeline import FRAMES
from eval.packed_serving import cell, extremes, read_at, system_name, table, write
from sglmoe.memory.read_rate import READ_RATE


def row(number: int, tokens: float, stall: float, packed_frames: float) -> dict[str, Any]:
    timeline = {kind: [0.0, 2.0] for kind in FRAMES} | {"packed_frames": [packed_frames] * 3}
    return {
        "round": number,
        "output_throughput": tokens,
        "stall_seconds": stall,
        "hit_ratio": 50.0,
        "packed_ratio": 10.0,
        "stall_share": 30.0,
        "timeline": timeline,
        "packed": {"target_frames": 7, "decode_ratio": 0.12345},
    }


def test_a_round_is_compared_to_the_same_round_of_the_first_share() -> None:
    off = [row(0, 100.0, 4.0, 0), row(1, 50.0, 2.0, 0), row(2, 80.0, 1.0, 0)]
    auto = [row(0, 150.0, 1.0, 10), row(1, 100.0, 1.0, 20), row(2, 80.0, 1.0, 30)]
    its = cell("400MB", "auto", 4, auto, off)
    assert its.ratios == [1.5, 2.0, 1.0]
    assert its.stall_ratios == [0.25, 0.5, 1.0]
    assert its.tokens_per_second == 100.0
    assert (its.frames["packed_frames"], its.frames["expert_frames"]) == (20.0, 1.0)
    assert (its.target_frames, its.decode_ratio) == (7, 0.123)
    assert extremes(its.ratios) == "1.50 [1.00 .. 2.00]"
    assert "| 400MB | 4 | auto | 100.0 | 1.50 [1.00 .. 2.00] |" in table([its])


def test_the_file_can_be_read_again(tmp_path: Path) -> None:
    rows = [row(0, 100.0, 4.0, 0)]
    cells = [cell(rate, "off", 1, rows, rows) for rate in ("none", "1GB")]
    write(tmp_path / "figures.json", {"commit": "abc", "machine": {"cores": 2}}, cells)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["machine"] == {"cores": 2}
    assert [its["read_rate"] for its in found["cells"]] == ["none", "1GB"]


def test_a_rate_is_told_to_servers_that_start_meanwhile() -> None:
    with read_at("400MB"):
        assert os.environ[READ_RATE] == "400MB"
    assert READ_RATE not in os.environ
    with read_at("none"):
        assert READ_RATE not in os.environ


def test_systems_differ_by_one_flag() -> None:
    assert system_name("auto", "75%") == "sglmoe@75%:--packed-share=auto"
    assert system_name("plain", "75%") == "sglmoe@75%:--packed-experts=off"
