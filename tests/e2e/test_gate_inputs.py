"""What gates read while a trace was recorded can be computed again, and that it was is checked."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from forking import run_in_fork

from eval.replay_predictors import Material
from sglmoe.demo_model import DEMO_MODEL
from sglmoe.prediction import train
from sglmoe.prediction.gate_inputs import gate_inputs, read_router
from sglmoe.prediction.trace import Trace, load_trace
from sglmoe.worker.predictors import predictors_for

TRACE = Path(__file__).parents[2] / "eval" / "traces" / "python-1.npz"


def share_chosen(trace: Trace) -> float:
    """Of the experts that the trace's tokens took, those that gates choose from the inputs."""
    torch.set_num_threads(1)
    inputs = gate_inputs(trace, DEMO_MODEL)
    router, found = read_router(DEMO_MODEL), 0
    for layer in range(trace.info.num_layers):
        only = slice(layer, layer + 1)
        ids, _ = router.choose(router.logits(inputs[:, layer], only), only)
        taken = trace.expert_ids[:, layer]
        found += sum(len(np.intersect1d(*pair)) for pair in zip(ids[0], taken, strict=True))
    return found / trace.expert_ids.size


def refusal(trace: Trace, model_dir: Path) -> str:
    torch.set_num_threads(1)
    try:
        gate_inputs(trace, model_dir)
    except ValueError as error:
        return str(error)
    return ""


def test_gates_choose_from_their_inputs_what_the_trace_has() -> None:
    # The server rounded to bfloat16, so a few near-ties fell the other way.
    assert run_in_fork(share_chosen, load_trace(TRACE)) > 0.99


def test_tokens_out_of_place_are_noticed() -> None:
    trace = load_trace(TRACE)
    shifted = msgspec.structs.replace(trace, positions=np.maximum(trace.positions - 1, 0))
    assert "request 0" in run_in_fork(refusal, shifted, DEMO_MODEL)


def test_another_model_is_refused(tmp_path: Path) -> None:
    other = run_in_fork(make_checkpoint, "qwen3_moe", tmp_path)
    assert "shape (3, 16, 128)" in run_in_fork(refusal, load_trace(TRACE), other)


def test_experts_in_groups_are_not_taken_for_plain_ones(tmp_path: Path) -> None:
    grouped = run_in_fork(make_checkpoint, "deepseek_v2", tmp_path)
    with pytest.raises(AssertionError, match="groups"):
        run_in_fork(read_router, grouped)


def train_and_load(folder: Path) -> list[str]:
    """The training command, and what a server of that model then has."""
    torch.set_num_threads(1)
    command = f"--model-path {DEMO_MODEL} --trace {TRACE} --predictor hybrid --epochs 1"
    assert train.main([*command.split(), "--output", str(folder)]) == 0
    its = Material(load_trace(TRACE), DEMO_MODEL).sources
    return list(predictors_for(str(folder / "hybrid.json"), its))


def test_the_hybrid_predictor_is_trained_by_command_and_loaded_by_path(tmp_path: Path) -> None:
    assert run_in_fork(train_and_load, tmp_path) == ["hybrid"]
    described = json.loads((tmp_path / "hybrid.json").read_text())
    by_name = {its["predictor"] for its in described["report"]["measured"]}
    assert by_name > {"hybrid"}
    assert (tmp_path / "hybrid.png").exists()
