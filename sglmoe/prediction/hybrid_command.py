"""The hybrid predictor in the training command: from traces and a model's folder to what is saved."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from tqdm import tqdm

from sglmoe.errors import predictors
from sglmoe.prediction.hybrid import Hybrid, HybridParameters
from sglmoe.prediction.hybrid_training import HybridExamples, HybridRecipe, fit_hybrid
from sglmoe.prediction.predictor import Embed, ModelParts
from sglmoe.prediction.training_data import Fitted, TracePart, TrainingData


def with_gate_inputs(parts: Sequence[TracePart], model_path: Path) -> list[TracePart]:
    """Traces have what gates said, not what they read: that is computed again, by the model.

    Raises ValueError for another model than the one that was traced.
    """
    from sglmoe.prediction.gate_inputs import gate_inputs  # imports transformers

    return [
        msgspec.structs.replace(part, gate_inputs=gate_inputs(part.trace, model_path))
        for part in tqdm(parts, "gate inputs", unit="trace")
    ]


def train_hybrid(data: TrainingData) -> Fitted:
    """See `training_data`; parts have gate inputs."""
    from sglmoe.prediction.gate_inputs import read_router

    recipe = HybridRecipe(seed=data.seed)
    if data.epochs is not None:
        recipe = msgspec.structs.replace(recipe, num_epochs=data.epochs)
    router, embed = read_router(data.model_path), read_embeddings(data.model_path)
    losses: list[float] = []
    with tqdm(unit="batch", desc="hybrid") as progress:

        def on_batch(done: int, total: int, loss: float) -> None:
            progress.total = total
            progress.update()
            losses.append(loss)

        fitted = fit_hybrid(examples_of(data.train), router, embed, recipe, on_batch)
    tensors, sizes = fitted.to_tensors()

    def new_predictor(parts: ModelParts) -> Hybrid:
        parameters = HybridParameters.from_tensors(dict(tensors), sizes)
        return Hybrid(msgspec.structs.replace(parts, embed=embed), router, parameters)

    epochs = np.array_split(np.array(losses), recipe.num_epochs)
    return Fitted(
        settings=dict(sizes),
        tensors=tensors,
        new_predictor=new_predictor,
        losses=[{"train": float(epoch.mean())} for epoch in epochs],
    )


def examples_of(parts: Sequence[TracePart]) -> HybridExamples:
    """The tokens of the requests that count."""
    token_ids, gate_inputs, expert_ids = [], [], []
    for part in parts:
        assert part.gate_inputs is not None
        counts = part.requests[part.trace.owners]
        token_ids.append(part.trace.token_ids[counts])
        gate_inputs.append(part.gate_inputs[counts])
        expert_ids.append(part.trace.expert_ids[counts])
    return HybridExamples(
        np.concatenate(token_ids), np.concatenate(gate_inputs), np.concatenate(expert_ids)
    )


def read_embeddings(model_path: Path) -> Embed:
    """The model's own table. Raises ValueError where the checkpoint has none by that name."""
    for path in sorted(model_path.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.endswith("embed_tokens.weight")]  # noqa: SIM118
            if names:
                table: npt.NDArray[np.float32] = file.get_tensor(names[0]).float().numpy()
                return lambda token_ids: table[token_ids]
    raise predictors.no_embeddings(model_path=model_path)
