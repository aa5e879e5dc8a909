"""Routers read out of a loaded model choose as SGLang does, for every family.

Checkpoints are float32: then a near-tie is no excuse.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from forking import run_in_fork
from loaded_worker import LoadedWorker
from test_families_reference import random_prompts
from test_parity import PAGED_FAMILIES

from sglmoe.prediction.gate_inputs import load_model, read_by_gates
from sglmoe.prediction.router import Router
from sglmoe.predictor.messages import LayerRouted, rows
from sglmoe.worker.routed import Routed

PROMPT = random_prompts(300)[0]

pytestmark = pytest.mark.usefixtures("preloaded")


class Observed(NamedTuple):
    """What the MoE layers of a worker's model did with `PROMPT`."""

    layer_ids: list[int]
    gate_inputs: np.ndarray  # [L, T, hidden]
    logits: np.ndarray  # [L, T, E]
    chosen: np.ndarray  # [L, T, top_k]
    router: Router | None
    embeddings: np.ndarray  # [T, hidden]


def observe(model_dir: Path, *, corrected: bool = False) -> Observed:
    """With `corrected`, gates are given correction biases: no family here has them, DeepSeek-V3 has."""
    from sglmoe.worker.model_runner_routers import embedding_of, read_router

    worker = LoadedWorker(model_dir, dtype="float32")
    model, experts = worker.loaded.runner.model, worker.loaded.experts
    if corrected:
        add_corrections(model)
    seen: dict[int, LayerRouted] = {}

    def note(routing: Routed) -> None:
        """Keep what the predictor is told."""
        event = routing.to_host(b"", with_logits=True, with_gate_input=True).event()
        assert isinstance(event, LayerRouted)
        seen[routing.layer] = event

    experts.note_router = note  # type: ignore[method-assign]
    worker.prefill(PROMPT)
    events = [seen[layer] for layer in range(len(experts.layer_ids))]

    def arrays(name: str, dtype: type) -> np.ndarray:
        return np.stack([rows(getattr(its, name), dtype, its.num_tokens) for its in events])

    return Observed(
        experts.layer_ids,
        gate_inputs=arrays("gate_input", np.float32),
        logits=arrays("logits", np.float32),
        chosen=arrays("expert_ids", np.int32),
        router=read_router(model, experts.layer_ids),
        embeddings=embedding_of(model)(np.array(PROMPT, np.int32)),
    )


def add_corrections(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for block in model.modules():
        if hasattr(block, "topk"):
            block.topk.topk_config.correction_bias = torch.rand(16, generator=generator)


def hf_gate_inputs(model_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """As transformers compute it: what gates read, [L, T, hidden], and the prompt's embeddings."""
    torch.set_num_threads(1)
    model = load_model(model_dir)
    table = model.get_input_embeddings().weight.detach().numpy()
    return read_by_gates(model, np.array(PROMPT, np.int32)).swapaxes(0, 1), table[PROMPT]


def check_choices(seen: Observed) -> None:
    router = seen.router
    assert router is not None
    assert router.num_layers == len(seen.layer_ids)
    assert seen.chosen.shape == (router.num_layers, len(PROMPT), router.top_k)
    for layer, hidden in enumerate(seen.gate_inputs):
        only = slice(layer, layer + 1)
        logits = router.logits(hidden, only)
        np.testing.assert_allclose(logits[0], seen.logits[layer], atol=1e-4)
        ids, _ = router.choose(logits, only)
        np.testing.assert_array_equal(np.sort(ids[0]), np.sort(seen.chosen[layer]))


@pytest.mark.parametrize("family", PAGED_FAMILIES)
def test_a_router_chooses_what_its_layer_chose(family: str, tmp_path: Path) -> None:
    # Red if layers come in another order, too: then inputs of one are shown to the gate of another.
    model_dir = run_in_fork(make_checkpoint, family, tmp_path, dtype="float32", attention_gain=1.0)
    seen = run_in_fork(observe, model_dir)
    run_in_fork(check_choices, seen)  # numpy starts threads, too
    # What transformers' gates read, too: `sglmoe.prediction.gate_inputs` completes traces with it.
    inputs, embeddings = run_in_fork(hf_gate_inputs, model_dir)
    np.testing.assert_allclose(inputs, seen.gate_inputs, atol=2e-3)
    np.testing.assert_array_equal(embeddings, seen.embeddings)


def test_correction_biases_decide_as_in_deepseek_v3(tmp_path: Path) -> None:
    model_dir = run_in_fork(make_checkpoint, "deepseek_v2", tmp_path, dtype="float32")
    seen = run_in_fork(observe, model_dir, corrected=True)
    assert seen.router is not None
    assert seen.router.scoring == "sigmoid"
    assert (seen.router.num_groups, seen.router.top_groups) == (4, 2)
    run_in_fork(check_choices, seen)  # numpy starts threads, too


def routers_of_others(model_dir: Path) -> list[Router | None]:
    """Of a model, when it is said to have other MoE layers than it has."""
    from sglmoe.worker.model_runner_routers import read_router

    model = LoadedWorker(model_dir).loaded.runner.model
    return [read_router(model, layer_ids) for layer_ids in ([], [0], [0, 1, 2])]


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v2"])
def test_layers_without_experts_have_no_router(family: str, tmp_path: Path) -> None:
    model_dir = run_in_fork(make_checkpoint, family, tmp_path)
    assert run_in_fork(routers_of_others, model_dir) == [None, None, None]
