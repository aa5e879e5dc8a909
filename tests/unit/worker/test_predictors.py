"""Which predictors there are for a model of 2 layers of 4 experts, and which are refused."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from sglmoe.prediction.hybrid import Hybrid, HybridParameters, shapes_of
from sglmoe.prediction.predictor import ModelParts
from sglmoe.prediction.pregate import Pregate
from sglmoe.prediction.router import Router
from sglmoe.prediction.routing_path import RoutingPath, to_saved
from sglmoe.prediction.routing_path_model import Dimensions, RoutingPathModel
from sglmoe.prediction.saved import Description, ServedShape, save_predictor
from sglmoe.prediction.wrong import Random
from sglmoe.worker.predictors import Sources, make_advisor, predictors_for

SHAPE = ServedShape(num_layers=2, num_experts=4, top_k=2, vocab_size=11)
UNTRAINED = ["last_step", "previous_layer", "frequency", "expert_map", "pregate"]


def sources(folder: Path, *, router: bool = True) -> Sources:
    parts = ModelParts(2, 4, 2, embed=lambda ids: np.ones((len(ids), 8), np.float32))
    gates = Router(weights=np.ones((2, 4, 8), np.float32), top_k=2)
    return Sources(parts=parts, router=gates if router else None, vocab_size=11, folder=folder)


def save(folder: Path, name: str, shape: ServedShape = SHAPE) -> Path:
    """A trained predictor that has learned nothing; what describes it."""
    if name == "routing_path":
        dimensions = Dimensions(num_layers=2, num_experts=4, vocab_size=11, d_model=8, d_ff=8)
        settings, tensors = to_saved(RoutingPathModel(dimensions))
    else:
        settings = {"num_layers": 2, "num_experts": 4, "hidden_size": 8, "width": 3, "horizon": 1}
        zeros = {key: np.zeros(its, np.float32) for key, its in shapes_of(settings).items()}
        tensors, settings = HybridParameters(**zeros).to_tensors()
    save_predictor(folder, Description(name, "tiny", shape, settings, [], {}), tensors)
    return folder / f"{name}.json"


def test_all_that_need_no_training(tmp_path: Path) -> None:
    assert list(predictors_for("auto", sources(tmp_path))) == UNTRAINED
    without = predictors_for("auto", sources(tmp_path, router=False))
    assert list(without) == UNTRAINED[:-1], "the family's routers are unknown"


def test_one_by_name(tmp_path: Path) -> None:
    [its] = predictors_for("pregate", sources(tmp_path)).values()
    assert isinstance(its, Pregate)
    [its] = predictors_for("random", sources(tmp_path)).values()
    assert isinstance(its, Random)


def test_trained_ones_beside_the_model(tmp_path: Path) -> None:
    save(tmp_path, "routing_path")
    save(tmp_path, "hybrid")
    found = predictors_for("auto", sources(tmp_path))
    assert list(found) == [*UNTRAINED, "routing_path", "hybrid"]
    assert isinstance(found["routing_path"], RoutingPath)
    assert isinstance(found["hybrid"], Hybrid)


def test_a_trained_one_from_elsewhere(tmp_path: Path) -> None:
    path = save(tmp_path / "elsewhere", "routing_path")
    found = predictors_for(str(path), sources(tmp_path))
    assert list(found) == ["routing_path"]
    with pytest.raises(ValueError, match=r"hybrid.json: No such file"):
        predictors_for(str(tmp_path / "hybrid.json"), sources(tmp_path))


def test_one_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "routing_path", msgspec.structs.replace(SHAPE, num_experts=8))
    with pytest.raises(ValueError, match=r"2 layers of 8 experts .* the model served has 2 layers"):
        predictors_for("auto", sources(tmp_path))


def test_names_of_none_are_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no 'hybrid' for this model; there are auto, last_step"):
        predictors_for("hybrid", sources(tmp_path))
    save(tmp_path, "hybrid")
    with pytest.raises(ValueError, match="this model's routers can't be read"):
        predictors_for("hybrid", sources(tmp_path, router=False))


def test_an_advisor_hears_all_of_them(tmp_path: Path) -> None:
    frame_table = np.full((2, 4), -1, np.int32)
    advisor = make_advisor("auto", sources(tmp_path), frame_table=frame_table)
    assert list(advisor.scores()) == UNTRAINED
    assert advisor.picked is None
    one = make_advisor("frequency", sources(tmp_path), frame_table=frame_table)
    assert one.picked == "frequency"
