"""The predictors that a server can have, by name."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from sglmoe.config import AUTO
from sglmoe.prediction.advisor import Advisor
from sglmoe.prediction.baselines import Frequency, LastStep, PreviousLayer
from sglmoe.prediction.expert_map import ExpertMap
from sglmoe.prediction.predictor import ModelParts, Predictor

MAKERS: Mapping[str, Callable[[ModelParts], Predictor]] = {
    "last_step": LastStep,
    "previous_layer": PreviousLayer,
    "frequency": Frequency,
    "expert_map": ExpertMap,
}


def make_advisor(name: str, parts: ModelParts, *, frame_table: npt.NDArray[np.int32]) -> Advisor:
    """With the one predictor that is asked for, or with all there are. Raises ValueError for a name of none."""
    return Advisor(predictors_for(name, parts), Frequency(parts), frame_table=frame_table)


def predictors_for(name: str, parts: ModelParts) -> dict[str, Predictor]:
    """By name; `AUTO` is all of them."""
    if name == AUTO:
        return {its: make(parts) for its, make in MAKERS.items()}
    if name not in MAKERS:
        raise ValueError(
            f"--expert-predictor: there is no {name!r}; there are {', '.join([AUTO, *MAKERS])}"
        )
    return {name: MAKERS[name](parts)}
