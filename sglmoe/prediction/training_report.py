"""How good a trained predictor is on requests that it did not learn from, beside some that learn nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.prediction.baselines import Frequency, LastStep
from sglmoe.prediction.predictor import LayerRouting, ModelParts, Predictor, Scores, StepTokens
from sglmoe.prediction.quality import QualityCounter, at_least, likeliest
from sglmoe.prediction.training_data import TracePart

NewPredictor = Callable[[ModelParts], Predictor]

BASELINES: Mapping[str, NewPredictor] = {"last_step": LastStep, "frequency": Frequency}
MAX_DISTANCE = 5  # layers ahead that are measured
# Of the scores taken as probabilities: an expert is predicted that is likelier used than not.
THRESHOLD = 0.5


class Figures(msgspec.Struct, frozen=True):
    """Of some predictions. None: nothing to measure it by."""

    accuracy: float | None  # He's: mean recall with as many experts predicted as were used
    precision: float | None  # of experts with a score of `THRESHOLD` and more
    recall: float | None  # with these
    calibration_error: float | None  # of scores taken as probabilities


class Measured(msgspec.Struct, frozen=True):
    """A predictor on some requests' steps, of prefill or of decoding: one token a request."""

    predictor: str
    requests: str
    kind: str
    num_steps: int
    overall: Figures  # the mean over layers, however often each was predicted
    by_layer: list[Figures]
    by_distance: list[Figures]  # predicted 1, 2, ... layers ahead


class Step(msgspec.Struct, frozen=True, eq=False):
    """Of a trace, as much as counts."""

    tokens: StepTokens
    routing: list[LayerRouting]
    ended: list[int]  # requests that have no further step

    @property
    def is_decode(self) -> bool:
        return len(np.unique(self.tokens.owners)) == self.tokens.num_tokens

    def used(self, num_experts: int) -> npt.NDArray[np.bool_]:
        """[layers, experts]"""
        used = np.zeros((len(self.routing), num_experts), bool)
        for layer in self.routing:
            used[layer.layer, layer.expert_ids] = True
        return used


def compare(name: str, new_predictor: NewPredictor, parts: Sequence[TracePart]) -> list[Measured]:
    """The predictor and the baselines, each begun anew on each part."""
    return [
        measured
        for part in parts
        for predictor, new in {name: new_predictor, **BASELINES}.items()
        for measured in measure(predictor, new, part)
    ]


def measure(name: str, new_predictor: NewPredictor, part: TracePart) -> list[Measured]:
    """What it would have predicted while these requests ran."""
    info = part.trace.info
    predictor = new_predictor(ModelParts(info.num_layers, info.num_experts, info.top_k))
    counters = {"decode": Counters(info.num_layers), "prefill": Counters(info.num_layers)}
    for step in steps_of(part):
        counter = counters["decode" if step.is_decode else "prefill"]
        counter.num_steps += 1
        used = step.used(info.num_experts)
        predictor.begin_step(step.tokens)
        counter.note(predictor.scores(), -1, used)
        for routing in step.routing:
            predictor.observe(routing)
            counter.note(predictor.scores(), routing.layer, used)
        for owner in step.ended:
            predictor.forget(owner)
    return [its.measured(name, part.name, kind) for kind, its in counters.items() if its.num_steps]


def steps_of(part: TracePart) -> Iterator[Step]:
    """The steps in which a request had tokens that counts, with those alone."""
    trace = part.trace
    last = {int(owner): place for place, owner in enumerate(trace.owners)}
    for start, stop in pairwise(trace.step_bounds.tolist()):
        places = start + np.flatnonzero(part.requests[trace.owners[start:stop]])
        if not len(places):
            continue
        owners = trace.owners[places]
        yield Step(
            StepTokens(trace.token_ids[places], trace.positions[places], owners),
            [
                LayerRouting(
                    layer,
                    trace.expert_ids[places, layer],
                    trace.probabilities[places, layer],
                    None if part.gate_inputs is None else part.gate_inputs[places, layer],
                )
                for layer in range(trace.info.num_layers)
            ],
            [owner for owner in np.unique(owners).tolist() if last[owner] < stop],
        )


class Counters:
    """Of steps of one kind, two sets predicted from the same scores."""

    def __init__(self, num_layers: int):
        self.num_steps = 0
        self._num_layers = num_layers
        self._as_many = QualityCounter(num_layers)
        self._likely = QualityCounter(num_layers)

    def note(self, scores: Scores, observed: int, used: npt.NDArray[np.bool_]) -> None:
        """Scores after layer `observed`, -1 before the first; `used` [layers, experts]."""
        for layer in range(observed + 1, min(observed + 1 + MAX_DISTANCE, self._num_layers)):
            truth, its = used[layer], scores[layer]
            for counter, predicted in (
                (self._as_many, likeliest(its, int(truth.sum()))),
                (self._likely, at_least(its, THRESHOLD)),
            ):
                counter.note(
                    layer, layer - observed, probabilities=its, predicted=predicted, used=truth
                )

    def measured(self, predictor: str, requests: str, kind: str) -> Measured:
        distances = range(1, min(MAX_DISTANCE, self._num_layers) + 1)
        by_layer = [self._figures(layer=layer) for layer in range(self._num_layers)]
        return Measured(
            predictor=predictor,
            requests=requests,
            kind=kind,
            num_steps=self.num_steps,
            overall=mean_of(by_layer),
            by_layer=by_layer,
            by_distance=[self._figures(distance=distance) for distance in distances],
        )

    def _figures(self, *, layer: int | None = None, distance: int | None = None) -> Figures:
        as_many = self._as_many.quality(layer=layer, distance=distance)
        likely = self._likely.quality(layer=layer, distance=distance)
        return Figures(
            accuracy=as_many.batch_accuracy,
            precision=likely.precision,
            recall=likely.recall,
            calibration_error=likely.calibration_error,
        )


def mean_of(figures: Sequence[Figures]) -> Figures:
    """Of each, where there is any."""
    columns = zip(*map(msgspec.structs.astuple, figures), strict=True)
    known = [[figure for figure in column if figure is not None] for column in columns]
    return Figures(*[sum(column) / len(column) if column else None for column in known])


def table(measured: Sequence[Measured]) -> str:
    """Markdown: a line for each predictor, requests and kind of steps."""
    lines = [
        "| requests | steps | predictor | accuracy | by layer | by distance | "
        f"precision at {THRESHOLD} | recall | calibration error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for its in measured:
        figures = its.overall
        cells = [
            its.requests,
            f"{its.num_steps} {its.kind}",
            its.predictor,
            percent(figures.accuracy),
            " ".join(percent(layer.accuracy) for layer in its.by_layer),
            " ".join(percent(distance.accuracy) for distance in its.by_distance),
            percent(figures.precision),
            percent(figures.recall),
            percent(figures.calibration_error),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.1f}"


def plot(measured: Sequence[Measured], losses: Sequence[Mapping[str, float]], path: Path) -> None:
    """Accuracy in decode steps by layer, and losses by epoch. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (accuracy, loss) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    styles = dict(
        zip(dict.fromkeys(its.predictor for its in measured), ("-", "--", ":"), strict=False)
    )
    colours = {
        name: f"C{i}" for i, name in enumerate(dict.fromkeys(its.requests for its in measured))
    }
    for its in measured:
        if its.kind == "decode":
            accuracy.plot(
                range(len(its.by_layer)),
                [layer.accuracy for layer in its.by_layer],
                styles[its.predictor],
                color=colours[its.requests],
                label=f"{its.predictor}, {its.requests}",
            )
    accuracy.set(xlabel="layer", ylabel="recall, as many predicted as used", ylim=(0, 1))
    accuracy.legend(fontsize="small")
    for name in losses[0]:
        loss.plot([epoch[name] for epoch in losses], label=name)
    loss.set(xlabel="epoch", ylabel="loss")
    loss.legend()
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        figure.savefig(unfinished, format="png")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
        pyplot.close(figure)
