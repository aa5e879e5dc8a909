"""What captured decode steps take, and what is done before SGLang captures them. That runs in `tests/e2e/test_graphs.py`."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglmoe.decode_graphs import DecodeGraphs
from sglmoe.worker import model_runner_graphs
from sglmoe.worker.model_runner_graphs import FullGraphs, capture_graphs, keep_to_one_stream

MIB = 2**20


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order."""
    done: list[str] = []
    for name in ("keep_logits_of_graphs", "keep_to_one_stream"):
        monkeypatch.setattr(model_runner_graphs, name, lambda *_, name=name: done.append(name))
    return done


def runner(steps: list[str], taken_mib: float = 0) -> SimpleNamespace:
    """SGLang's, which finds that graphs took so many MiB."""
    return SimpleNamespace(
        model=None,
        graph_memory_usage={"decode": taken_mib / 1024},
        init_cuda_graphs=lambda: steps.append("captured"),
    )


def test_before_capturing_what_a_break_needs_is_arranged(steps: list[str]) -> None:
    capture_graphs(runner(steps), DecodeGraphs(), on_progress=lambda *_: steps.append("told"))
    assert steps == ["captured"]  # nothing, in truth: nothing else changes
    steps.clear()
    capture_graphs(runner(steps), DecodeGraphs(8), on_progress=lambda *_: steps.append("told"))
    assert steps == ["told", "keep_logits_of_graphs", "keep_to_one_stream", "captured"]


def test_graphs_that_take_more_than_was_set_aside_are_told(
    steps: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for taken_mib in (64, 80):
        assert caplog.messages == []
        graphs = DecodeGraphs(8, 64 * MIB)
        capture_graphs(runner(steps, taken_mib), graphs, on_progress=lambda *_: None)
    (message,) = caplog.messages
    assert "took 80.00 MiB of the device, where 64.00 MiB" in message
    assert "lower --cuda-graph-max-bs-decode, or --memory-budget by 16.00 MiB" in message


def test_experts_are_computed_on_the_stream_that_is_captured() -> None:
    """Qwen2-MoE's shared experts would else make the others run on a second one, where no graph can break."""
    model = torch.nn.Module()
    model.block, model.attention = torch.nn.Module(), torch.nn.Module()
    model.block.experts = torch.nn.Module()
    model.block.alt_stream = model.attention.alt_stream = SimpleNamespace()
    keep_to_one_stream(model)
    assert model.block.alt_stream is None
    assert model.attention.alt_stream is not None


class Steps:
    """In the place of `CapturedSteps`: frames for two rows at most."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def lend(self, num_rows: int) -> bool:
        self.asked.append(num_rows)
        return num_rows <= 2


def batch(num_rows: int, *, decodes: bool = True) -> Any:
    mode = SimpleNamespace(is_decode=lambda: decodes)
    return SimpleNamespace(batch_size=num_rows, forward_mode=mode)


@pytest.mark.parametrize(
    ("num_rows", "decodes", "may_replay", "asked"),
    [
        (2, True, True, [2]),
        (3, True, True, [3]),  # in vain
        (2, False, True, []),  # a prefill
        (2, True, False, []),  # a step that is traced
        (9, True, True, []),  # no graph is as large
    ],
)
def test_sglang_sees_graphs_in_steps_that_have_frames_and_in_no_others(
    num_rows: int, decodes: bool, may_replay: bool, asked: list[int]
) -> None:
    graphs = SimpleNamespace(can_run_graph=lambda its: its.batch_size <= 4)
    sglang = SimpleNamespace(decode_cuda_graph_runner=graphs)
    steps = Steps()
    full = FullGraphs(sglang, steps)  # type: ignore[arg-type]
    for _ in range(2):
        steps.asked.clear()
        replay = full.lend(batch(num_rows, decodes=decodes), may_replay=may_replay)
        replays = num_rows <= 2 and decodes and may_replay
        assert replay is (steps if replays else None)
        assert sglang.decode_cuda_graph_runner is (graphs if replays else None)
        assert steps.asked == asked


def test_without_steps_of_ours_sglang_replays_what_it_can() -> None:
    sglang = SimpleNamespace(decode_cuda_graph_runner="graphs")
    assert FullGraphs(sglang, None).lend(batch(1), may_replay=True) is None
    assert sglang.decode_cuda_graph_runner == "graphs"


def test_full_graphs_have_no_break_to_prepare(steps: list[str]) -> None:
    graphs = DecodeGraphs(8, is_full=True)
    capture_graphs(runner(steps), graphs, on_progress=lambda *_: steps.append("told"))
    assert steps == ["told", "captured"]
