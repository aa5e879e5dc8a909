"""The report of the shifting workload: each round beside the same round of the best and the worst split."""

import json
import lzma
import time
from pathlib import Path
from typing import Any

import pytest

from eval.memory_timeline import COUNTERS, FRAMES, frames_by_kind, read_counters, watched
from eval.serving_report import write_report
from eval.serving_runs import Groups, ratio, read_runs
from eval.shifting_report import (
    Setting,
    by_setting,
    joined,
    rates,
    static_extremes,
    summary,
    table,
)

# One long phase at one budget. Rounds drift together: the second is twice as fast for everyone.
THROUGHPUT = {"static=20%": (100, 200), "static=80%": (50, 110), "cost-aware": (98, 210)}


def row(policy: str, number: int, throughput: float, phase: str = "long") -> dict[str, Any]:
    """What `eval.serving` writes, with a server that has counted little."""
    timeline = {name: [0.0, 1.0] for name in ("seconds", *COUNTERS)}
    timeline |= {name: [2.0, 2.0] for name in FRAMES}
    counters = dict.fromkeys(COUNTERS, 0) | {
        "expert_hits": 30,
        "expert_misses": 10,
        "stall_seconds": 0.5,
        "cache_hit_tokens": 60,
        "prefill_tokens": 40,
        "rejected_requests": number,
        "preempted_requests": 1,
    }
    return {
        "system": f"sglmoe@50%:--memory-policy={policy}",
        "budget": "50%",
        "policy": policy,
        "phase": phase,
        "concurrency": 8,
        "round": number,
        "start_seconds": 1.0,
        "total_throughput": throughput,
        "output_throughput": throughput / 10,
        "median_ttft_ms": 7.0,
        "duration": 10.0,
        "timeline": timeline,
        **counters,
    }


def written(folder: Path, *phases: str) -> Groups:
    head = {
        "machine": {"gpu": None, "cpu": "a CPU", "cores": 2, "torch": "2"},
        "commit": "abc",
        "command": "python -m eval.serving",
    }
    rows = [
        row(policy, number, throughput, phase)
        for phase in phases
        for policy, both in THROUGHPUT.items()
        for number, throughput in enumerate(both)
    ]
    (folder / "runs.jsonl").write_text("\n".join(json.dumps(line) for line in (head, *rows)))
    return read_runs(folder)[1]


def test_best_and_worst_are_of_the_static_splits_alone(tmp_path: Path) -> None:
    """That cost-aware beats the best in the second round makes it no baseline."""
    (policies,) = by_setting(written(tmp_path, "long")).values()
    assert static_extremes(policies) == ("static=20%", "static=80%")
    assert static_extremes({"cost-aware": policies["cost-aware"]}) is None


def test_rounds_are_compared_with_their_own(tmp_path: Path) -> None:
    """98/100 and 210/200; across rounds the extremes would be 0.49 and 2.1."""
    settings = by_setting(written(tmp_path, "long"))
    assert list(settings) == [Setting("50%", 8, "long")]
    lines = summary(settings).splitlines()
    assert lines[0].endswith("| best to worst | cost-aware to best | to worst |")
    assert lines[2] == (
        "| 50% | 8 | long | 20% | 80% | 1.91 [1.82 .. 2.00] | 1.02 [0.98 .. 1.05] | 1.93 [1.91 .. 1.96] |"
    )


def test_an_interrupted_run_is_compared_as_far_as_it_came(tmp_path: Path) -> None:
    """Without the second round of static=80%: 100/50, not 200/50."""
    (policies,) = by_setting(written(tmp_path, "long")).values()
    best, worst = policies["static=20%"], policies["static=80%"]
    assert ratio(best, worst[:1], "total_throughput") == "2.00 [2.00 .. 2.00]"
    assert ratio(best[1:], worst[:1], "total_throughput") == ""


def test_a_line_tells_what_a_split_costs(tmp_path: Path) -> None:
    """Medians over the rounds, but requests that had to wait or begin again are summed."""
    lines = table(by_setting(written(tmp_path, "long"))).splitlines()
    assert lines[3] == (
        "| long | static=80% | 80.0 | 8.0 | 0.53 [0.50 .. 0.55] | 1.00 [1.00 .. 1.00] | 7 "
        "| 60.0 % | 75.0 % | 5.0 % | 1 | 2 |"
    )


def test_runs_are_read_packed_too(tmp_path: Path) -> None:
    plain = written(tmp_path, "long")
    path = tmp_path / "runs.jsonl"
    (tmp_path / "runs.jsonl.xz").write_bytes(lzma.compress(path.read_bytes()))
    path.unlink()
    assert read_runs(tmp_path)[1] == plain


def test_a_server_without_counters_is_compared_too(tmp_path: Path) -> None:
    written(tmp_path, "long")
    plain = row("", 0, 80.0)
    for name in (*COUNTERS, "timeline"):
        del plain[name]
    path = tmp_path / "runs.jsonl"
    path.write_text(
        path.read_text().splitlines()[0]
        + "".join(
            "\n" + json.dumps(plain | {"system": "unmodified", "round": number})
            for number in range(2)
        )
    )
    settings = by_setting(read_runs(tmp_path)[1])
    assert (
        table(settings).splitlines()[2]
        == "| long | unmodified | 80.0 | 8.0 |  |  | 7 |  |  |  |  |  |"
    )


# ------------------------------------------------------------------------------------------ over time


def test_kv_frames_are_shared_out_by_their_pages() -> None:
    memory = {
        "num_frames": 8,
        "free_frames": 1,
        "expert_frames": 2,
        "packed_frames": 1,
        "kv_frames": 4,
        "locked_pages": 3,
        "cached_pages": 1,
    }
    frames = frames_by_kind(memory)
    assert list(frames) == list(FRAMES)
    assert list(frames.values()) == [2, 1, 3.0, 1.0, 1]
    assert sum(frames.values()) == memory["num_frames"]
    empty = memory | {"kv_frames": 0, "free_frames": 5, "locked_pages": 0, "cached_pages": 0}
    assert list(frames_by_kind(empty).values()) == [2, 1, 0.0, 0.0, 5]


def test_counters_come_from_the_worker_and_the_scheduler() -> None:
    memory = {name: 1 for name in COUNTERS if name.split("_")[0] not in ("decoded", "rejected")}
    totals = {"decoded_tokens": 2, "rejected_requests": 3, "preempted_requests": 4}
    del memory["preempted_requests"]
    counters = read_counters({"memory": memory | {"num_frames": 9}, "totals": totals})
    assert list(counters) == list(COUNTERS)
    assert [counters[name] for name in COUNTERS[-3:]] == [2, 3, 4]


class Growing:
    """A server that computes ten tokens between two looks at it."""

    def __init__(self) -> None:
        self.looks = 0

    def state(self) -> dict[str, Any]:
        self.looks += 1
        memory = dict.fromkeys(COUNTERS[:-3], 0) | {"prefill_tokens": 10 * self.looks}
        frames = {"free_frames": 8, "expert_frames": 0, "packed_frames": 0, "kv_frames": 0}
        pages = {"locked_pages": 0, "cached_pages": 0}
        return {"memory": memory | frames | pages, "totals": dict.fromkeys(COUNTERS[-3:], 0)}


def test_memory_is_watched_from_the_first_moment_to_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Were it only looked at in between, a phase shorter than the period would have no figure."""
    monkeypatch.setattr("eval.memory_timeline.PERIOD_SECONDS", 60.0)
    server: Any = Growing()
    with watched(server, started=time.perf_counter()) as timeline:
        assert timeline["prefill_tokens"] == [10]
    assert timeline["prefill_tokens"] == [10, 20]
    assert timeline["free_frames"] == [8, 8]
    assert 0 <= timeline["seconds"][0] <= timeline["seconds"][1] < 60


def test_memory_is_watched_no_longer_than_the_benchmark_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eval.memory_timeline.PERIOD_SECONDS", 0.001)
    server: Any = Growing()

    def interrupted() -> None:
        while server.looks < 3:
            time.sleep(0.001)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(server, started=0.0):
        interrupted()
    looks = server.looks
    time.sleep(0.02)
    assert server.looks == looks


def test_a_rate_is_the_growth_over_the_last_two_seconds() -> None:
    """10 tokens each second, but in the third none; a prompt of 40 that counts at once in the fifth."""
    timeline = {
        "seconds": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
        "prefill_tokens": [0, 10, 20, 20, 30, 70],
        "cache_hit_tokens": [0, 0, 0, 0, 0, 10],
    }
    assert rates(timeline, "prefill_tokens", over_seconds=2.0) == [0, 10, 10, 5, 5, 25]
    assert rates(timeline, "prefill_tokens", "cache_hit_tokens", over_seconds=2.0)[-1] == 30


def test_the_phases_of_a_run_follow_each_other() -> None:
    parts = {"long": {"seconds": [0.0, 1.0]}, "short": {"seconds": [1.5, 2.0]}}
    assert joined(parts) == {"seconds": [0.0, 1.0, 1.5, 2.0]}


def test_a_report_of_several_phases_has_a_figure_for_each_system(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written(tmp_path, "long", "short")
    text = write_report(tmp_path).read_text()
    images = sorted(path.name for path in tmp_path.glob("*.png"))
    assert images == [
        "frames-50-cost-aware-x8.png",
        "frames-50-static-20-x8.png",
        "frames-50-static-80-x8.png",
    ]
    assert all(f"]({name})" in text for name in images)
    assert "## 50% budget, 8 at a time" in text
