"""The predictors that a server can have, by name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.config import AUTO
from sglmoe.errors import predictors as errors
from sglmoe.prediction.advisor import Advisor
from sglmoe.prediction.baselines import Frequency, LastStep, PreviousLayer
from sglmoe.prediction.expert_map import ExpertMap
from sglmoe.prediction.hybrid import Hybrid, HybridParameters
from sglmoe.prediction.predictor import ModelParts, Predictor
from sglmoe.prediction.pregate import Pregate
from sglmoe.prediction.router import Router
from sglmoe.prediction.routing_path import from_saved
from sglmoe.prediction.saved import ServedShape, description_path, load_predictor
from sglmoe.prediction.wrong import Contrary, Random

Maker: TypeAlias = Callable[[], Predictor]

# Of 48 layers of 128 experts and a hidden size of 2048, asking the gates of 4 layers ahead takes 0.2 ms for one token and
# 0.8 ms for 16, a layer (one thread of a busy CPU). All 47 would take 60 and 300 ms a step.
PREGATE_LAYERS = 4
TRAINED = ("routing_path", "hybrid")


class Sources(msgspec.Struct, frozen=True, eq=False):
    """What predictors are made from."""

    parts: ModelParts
    router: Router | None  # None if the family's is unknown
    vocab_size: int
    folder: Path  # the model's: trained predictors are beside it

    @property
    def shape(self) -> ServedShape:
        parts = self.parts
        return ServedShape(parts.num_layers, parts.num_experts, parts.top_k, self.vocab_size)


def make_advisor(name: str, sources: Sources, *, frame_table: npt.NDArray[np.int32]) -> Advisor:
    """With the one predictor that is asked for, or with all there are. Raises ValueError for one that does not exist or fit."""
    frequency = partial(Frequency, sources.parts)
    return Advisor(
        predictors_for(name, sources), frequency(), frame_table=frame_table, fallback=frequency
    )


def predictors_for(name: str, sources: Sources) -> dict[str, Predictor]:
    """By name, or by the path of what describes a trained one; `AUTO` is all of them that may be right."""
    if name.endswith(".json"):
        path = Path(name)
        return {path.stem: load_trained(path.stem, path.parent, sources)}
    makers = known_makers(sources)
    if name == AUTO:
        return {its: make() for its, make in makers.items()}
    makers |= wrong_makers(sources)
    if name not in makers:
        raise errors.not_for_this_model(given=name, known=[AUTO, *makers])
    return {name: makers[name]()}


def known_makers(sources: Sources) -> dict[str, Maker]:
    """Of those that need no training, and of the trained ones that are beside the model."""
    parts = sources.parts
    makers: dict[str, Maker] = {
        "last_step": partial(LastStep, parts),
        "previous_layer": partial(PreviousLayer, parts),
        "frequency": partial(Frequency, parts),
        "expert_map": partial(ExpertMap, parts),
    }
    if sources.router is not None:
        makers["pregate"] = partial(Pregate, parts, sources.router, horizon=PREGATE_LAYERS)
    for name in TRAINED:
        if description_path(sources.folder, name).exists():
            makers[name] = partial(load_trained, name, sources.folder, sources)
    return makers


def wrong_makers(sources: Sources) -> dict[str, Maker]:
    """To be compared with: by name only."""
    return {
        "random": partial(Random, sources.parts),
        "contrary": partial(Contrary, sources.parts),
    }


def load_trained(name: str, folder: Path, sources: Sources) -> Predictor:
    """Raises ValueError for files that are missing or broken, or of another model."""
    description, tensors = load_predictor(folder, name, sources.shape)
    if description.predictor == "routing_path":
        return from_saved(description.settings, tensors)
    if sources.router is None:
        raise errors.unreadable_routers(path=folder / name)
    parameters = HybridParameters.from_tensors(dict(tensors), dict(description.settings))
    return Hybrid(sources.parts, sources.router, parameters)
