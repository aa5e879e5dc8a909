"""What gates read while a trace was recorded, computed again: traces hold only what gates said.

With it `sglmoe.prediction.pregate` and `hybrid` can be replayed and trained from traces.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from sglmoe.errors import predictors
from sglmoe.prediction.router import Router
from sglmoe.prediction.trace import Trace

Floats = npt.NDArray[np.float32]

# Mean total variation between a request's probabilities in the trace and here. The demo model's, served in
# bfloat16: 0.003. One token out of place: 0.6 or more.
MAX_DISTANCE = 0.05


def gate_inputs(trace: Trace, model_path: str | Path) -> Floats:
    """[T, layers, hidden] of the trace's T tokens, by transformers in float32.

    Raises ValueError where the gates say something else to it than the trace has: another model, or
    tokens out of place.
    """
    model = load_model(model_path)
    weights = gate_weights(model)
    if weights.shape[:2] != (trace.info.num_layers, trace.info.num_experts):
        raise predictors.gates_of_another_shape(
            model_path=str(model_path), shape=str(weights.shape), model=trace.info.model
        )
    inputs = np.empty((len(trace.token_ids), *weights.shape[::2]), np.float32)
    for request in np.unique(trace.owners).tolist():
        places = np.flatnonzero(trace.owners == request)
        read = read_by_gates(model, trace.tokens_of(request))
        inputs[places] = read[trace.positions[places]]
        check_agreement(trace, places, inputs[places], weights, request)
    return inputs


def check_agreement(
    trace: Trace, places: npt.NDArray[np.intp], inputs: Floats, weights: Floats, request: int
) -> None:
    """Raises ValueError where gates say something else to `inputs` than the trace has for its tokens."""
    logits = torch.from_numpy(np.einsum("tlh,leh->tle", inputs, weights))
    here = logits.softmax(dim=-1).numpy()
    differences = np.abs(here - trace.probabilities[places].astype(np.float32))
    distance = float(differences.sum(axis=-1).mean() / 2)
    if distance > MAX_DISTANCE:
        raise predictors.gates_of_another_model(
            request=request,
            distance=distance,
            max_distance=MAX_DISTANCE,
            model=trace.info.model,
        )


def read_router(model_path: str | Path) -> Router:
    """Of a model whose experts are the top k of all. Raises ValueError for one with groups of experts."""
    model = load_model(model_path)
    if (getattr(model.config, "n_group", None) or 1) > 1:
        raise predictors.grouped_experts(model_path=str(model_path))
    return Router(gate_weights(model), model.config.num_experts_per_tok)


def load_model(model_path: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


def gates_of(model: Any) -> list[Any]:
    """The modules that are gates, by layer; layers without experts have none."""
    blocks = [layer.mlp for layer in model.model.layers]
    gates = [getattr(block, "gate", None) or getattr(block, "router", None) for block in blocks]
    return [gate for gate in gates if gate is not None]


def gate_weights(model: Any) -> Floats:
    """[layers, experts, hidden]."""
    return np.stack([gate.weight.detach().numpy() for gate in gates_of(model)])


def read_by_gates(model: Any, token_ids: npt.NDArray[np.int32]) -> Floats:
    """[tokens, layers, hidden] of one sequence."""
    with torch.inference_mode(), recorded_inputs(gates_of(model)) as inputs:
        model(input_ids=torch.from_numpy(token_ids[None].astype(np.int64)), use_cache=False)
    read: Floats = torch.stack(inputs, dim=1).numpy()
    return read


@contextmanager
def recorded_inputs(gates: list[Any]) -> Iterator[list[torch.Tensor]]:
    """The gates' inputs, [tokens, hidden] each, of what runs inside."""
    inputs: list[torch.Tensor] = []

    def keep(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs.append(arguments[0].reshape(-1, arguments[0].shape[-1]))

    hooks = [gate.register_forward_pre_hook(keep) for gate in gates]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
