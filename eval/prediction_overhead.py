"""What predicting costs a step: with the predictor's process, against the same step without.

    python -m eval.prediction_overhead --output eval/results/prediction-overhead-cpu.json

A step is a made-up forward pass: each layer is a few matrix products that let go of the GIL and take
`--layer-seconds` together; memory and prefetching are called as the model calls them, loads bring
nothing and take no time. Routing is made up too: experts with unequal chances, and tokens that choose
two thirds of their experts again. Steps with and without take turns, `--window` at a time, and the
ratio is of neighbours: of seconds, and of CPU seconds of the forward pass's thread, which on a machine with
nothing else to do are the same, and on a busy one leave out who else ran meanwhile. Where no core is left for
the predictor, its CPU time counts too.

"nobody" is a predictor that is told all and answers but computes nothing: what telling costs.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import psutil
import torch
from tqdm import tqdm

from eval.servers import describe_run
from sglmoe.config import PrefetchMode
from sglmoe.memory.arena import plan_geometry
from sglmoe.memory.experts import ABSENT, Load
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.prefetch import Arrival
from sglmoe.memory.step_times import StepTimes
from sglmoe.prediction.advisor import AUDITION_STEPS, Advisor, LinkTimes, Outlook
from sglmoe.prediction.baselines import LastStep
from sglmoe.prediction.predictor import LayerRouting, ModelParts, StepTokens
from sglmoe.predictor.listener import SentEmbeddings
from sglmoe.predictor.process import PROCESS_NAME, start_predictor
from sglmoe.worker.predictors import Sources, make_advisor
from sglmoe.worker.prefetching import Prefetching
from sglmoe.worker.request import WorkerRequest
from sglmoe.worker.routed import Routed
from sglmoe.worker.step_watch import StepCost, StepKind

SEED = 0
NUM_STEPS = 32  # of routing, over and over
REPEAT_RATIO = 2 / 3  # of experts, from one step to the next
HIDDEN = 256
EXPERT_BYTES = 4096  # of which none is ever moved
LOADS_PER_LAYER = 2  # that the link has time for


class Figures(msgspec.Struct, frozen=True):
    """Of one predictor and one length of layers."""

    predictor: str
    layer_seconds: float
    step_seconds: float  # median of windows, without
    ratio: float  # median over pairs of windows: with, as a share of without
    ratios: list[float]
    cpu_ratio: float  # the same of CPU seconds of the forward pass's thread
    cpu_ratios: list[float]
    predictor_ratio: float  # the predictor's CPU time, as a share of a step without
    main_ratio: (
        float  # CPU seconds that the forward pass's thread spends in its calls, in the median step
    )
    # The same of a layer, in seconds: the tenth that was disturbed least, and the median.
    main_layer_least: float
    main_layer_median: float
    skipped_steps: int


class Times(NamedTuple):
    """Of a step, or medians."""

    seconds: float
    cpu_seconds: float  # of the forward pass's thread


class NoLink:
    """Whatever is prefetched is there at once."""

    def __init__(self) -> None:
        self._begun: list[Load] = []

    def begin(self, load: Load) -> None:
        self._begun.append(load)

    def finished(self) -> list[Arrival]:
        begun, self._begun = self._begun, []
        return [Arrival(load, is_there=True) for load in begun]

    def promote(self, load: Load) -> None:
        self._begun.remove(load)

    def wait(self, load: Load) -> bool:
        return True

    def cancel(self, load: Load) -> None:
        self._begun.remove(load)


class Work:
    """Some matrix products that take so long together."""

    def __init__(self, seconds: float, num_products: int):
        self._num_products = num_products
        self._right = torch.rand(HIDDEN, HIDDEN)
        self._left = torch.rand(64, HIDDEN)
        for _ in range(4):
            num_rows = len(self._left) * seconds / self._measured()
            self._left = torch.rand(max(1, round(num_rows)), HIDDEN)

    def __call__(self) -> None:
        for _ in range(self._num_products):
            torch.mm(self._left, self._right)

    def _measured(self) -> float:
        times = []
        for _ in range(20):
            started = time.perf_counter()
            self()
            times.append(time.perf_counter() - started)
        return min(times)


class Model:
    """Runs steps; knows what each token of each step chooses in each layer."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        random = np.random.default_rng(SEED)
        shape = (options.layers, options.batch, options.experts)
        self.logits = torch.from_numpy(random.standard_normal((options.layers, 1, options.experts)))
        steps = [torch.from_numpy(random.gumbel(size=shape)) for _ in range(NUM_STEPS)]
        for before, step in pairwise(steps):
            keeps = torch.from_numpy(random.random(shape) < REPEAT_RATIO)
            step[keeps] = before[keeps]
        hidden = torch.rand(options.batch, HIDDEN)
        self._routed: list[list[Routed]] = []  # of each step and layer
        for step in steps:
            logits = (self.logits + step).float()
            ids = logits.topk(options.top_k, dim=-1).indices.int()
            self._routed.append(
                [
                    Routed(layer, *its, hidden)
                    for layer, its in enumerate(zip(ids, logits, strict=True))
                ]
            )
        self._experts = [[np.unique(its.ids) for its in step] for step in self._routed]
        self.memory = MemoryManager(
            plan_geometry(
                arena_bytes=options.layers * options.experts // 2 * EXPERT_BYTES,
                expert_bytes=EXPERT_BYTES,
                token_bytes=64,
                token_rows=2,
                page_tokens=None,
            ),
            num_layers=options.layers,
            num_experts=options.experts,
            floor_frames=options.top_k,
            load_experts=lambda loads: None,
            background=NoLink(),
        )
        self.main_seconds: list[float] = []  # of steps, in calls of prefetching
        self.layer_seconds: list[float] = []  # the same of layers
        self._number = 0
        self._rids = [str(number) for number in range(options.batch)]
        self._requests: list[WorkerRequest] = [None] * options.batch  # type: ignore[list-item]

    def step(self, work: Work, prefetching: Prefetching | None) -> Times:
        started, cpu_started = time.perf_counter(), time.thread_time()
        number = self._number = self._number + 1
        self.memory.begin_step()
        if prefetching is not None:
            self.main_seconds.append(0.0)
            tokens = np.arange(len(self._rids))
            self._call(
                lambda: prefetching.begin_step(
                    self._rids, token_ids=tokens, positions=tokens + number, owners=tokens
                )
            )
        for layer in range(self.options.layers):
            self._layer(layer, number % NUM_STEPS, work, prefetching)
        seconds = time.perf_counter() - started
        if prefetching is not None:
            self._call(prefetching.look_ahead)
            kind = StepKind(self._requests, 0)
            cost = StepCost(seconds, 0.0, 0)
            self._call(lambda: prefetching.step_done(kind, self.memory.snapshot(number), cost))
        return Times(time.perf_counter() - started, time.thread_time() - cpu_started)

    def _layer(self, layer: int, step: int, work: Work, prefetching: Prefetching | None) -> None:
        """Experts run when half of the layer has."""
        before = self.main_seconds[-1] if prefetching is not None else 0.0
        work()
        if prefetching is not None:
            routed = self._routed[step][layer]
            self._call(lambda: prefetching.routed(layer, routed))
        for _ in self.memory.waves(layer, self._experts[step][layer]):
            if prefetching is not None:
                self._call(prefetching.look_ahead)
        work()
        if prefetching is not None:
            self._call(prefetching.look_ahead)
            self.layer_seconds.append(self.main_seconds[-1] - before)

    def _call(self, call: Callable[[], object]) -> None:
        started = time.perf_counter()
        call()
        self.main_seconds[-1] += time.perf_counter() - started


class Nobody(Advisor):
    """Is told all there is, and always says the same."""

    def begin_step(
        self, step: int, tokens: StepTokens, times: LinkTimes, *, late: int, unused: int
    ) -> None:
        self._step = step

    def observe(self, routing: LayerRouting, *, was_absent: npt.NDArray[np.bool_]) -> None:
        self._layer = routing.layer

    def outlook(self) -> Outlook:
        return Outlook(self._step, self._layer, np.zeros(self._shape, np.float32), [])


def make(predictor: str, sources: Sources, frame_table: npt.NDArray[np.int32]) -> Advisor:
    if predictor == "nobody":
        silent = LastStep(sources.parts)
        return Nobody({predictor: silent}, silent, frame_table=frame_table)
    return make_advisor(predictor, sources, frame_table=frame_table)


def start_prefetching(model: Model, predictor: str, layer_seconds: float) -> Prefetching:
    """As the worker does it."""
    options = model.options
    times = StepTimes()
    load_seconds = layer_seconds / LOADS_PER_LAYER
    times.note_loads(1, waited_seconds=load_seconds, link_seconds=load_seconds)
    times.note_decode(options.batch, options.layers * layer_seconds)
    parts = ModelParts(options.layers, options.experts, options.top_k)
    sources = Sources(parts, router=None, vocab_size=0, folder=Path("nowhere"))
    frame_table = np.full_like(model.memory.frame_table, ABSENT)
    client = start_predictor(
        make(predictor, sources, frame_table),
        frame_table,
        SentEmbeddings(HIDDEN),
    )
    return Prefetching(
        model.memory,
        client,
        mode=PrefetchMode(options.mode),
        times=times,
        first_load_seconds=0.0,
    )


def measure(options: argparse.Namespace, predictor: str, layer_seconds: float) -> Figures:
    model = Model(options)
    work = Work(layer_seconds / 2, options.products)
    prefetching = start_prefetching(model, predictor, layer_seconds)
    for _ in range(options.warmup):
        model.step(work, prefetching)
    pairs, predictor_seconds = [], 0.0
    model.main_seconds, model.layer_seconds = [], []
    for _ in range(options.rounds):
        model.step(work, None)  # meanwhile the predictor catches up
        without = [model.step(work, None) for _ in range(options.window)]
        model.step(work, prefetching)
        before = predictor_cpu_seconds()
        together = [model.step(work, prefetching) for _ in range(options.window)]
        predictor_seconds += predictor_cpu_seconds() - before
        pairs.append((medians(without), medians(together)))
    prefetching.close()
    step_seconds = median(without.seconds for without, _ in pairs)
    ratios = [together.seconds / without.seconds for without, together in pairs]
    cpu_ratios = [together.cpu_seconds / without.cpu_seconds for without, together in pairs]
    num_steps = options.rounds * options.window
    return Figures(
        predictor=predictor,
        layer_seconds=layer_seconds,
        step_seconds=step_seconds,
        ratio=median(ratios),
        ratios=[round(its, 4) for its in ratios],
        cpu_ratio=median(cpu_ratios),
        cpu_ratios=[round(its, 4) for its in cpu_ratios],
        predictor_ratio=predictor_seconds / num_steps / step_seconds,
        main_ratio=median(model.main_seconds) / step_seconds,
        main_layer_least=float(np.quantile(model.layer_seconds, 0.1)),
        main_layer_median=median(model.layer_seconds),
        skipped_steps=prefetching.num_skipped_steps,
    )


def medians(steps: Sequence[Times]) -> Times:
    return Times(median(its.seconds for its in steps), median(its.cpu_seconds for its in steps))


def predictor_cpu_seconds() -> float:
    """Of the predictor's process, since it began; the kernel counts hundredths."""
    [process] = (its for its in multiprocessing.active_children() if its.name == PROCESS_NAME)
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def table(found: Sequence[Figures]) -> str:
    lines = [
        f"{'predictor':16s} layer ms  step ms  with/without {'':21s} CPU{'':25s}predictor   main, us/layer       skipped"
    ]
    for its in found:
        ratios = f"{its.ratio:.3f} {extremes(its.ratios)}"
        cpu_ratios = f"{its.cpu_ratio:.3f} {extremes(its.cpu_ratios)}"
        lines.append(
            f"{its.predictor:16s} {1e3 * its.layer_seconds:8.1f} {1e3 * its.step_seconds:8.1f}  "
            f"{ratios:33s} {cpu_ratios:27s} {its.predictor_ratio:9.1%} {its.main_ratio:6.1%} "
            f"{1e6 * its.main_layer_least:7.1f} to {1e6 * its.main_layer_median:6.1f} {its.skipped_steps:8d}"
        )
    return "\n".join(lines)


def extremes(ratios: Sequence[float]) -> str:
    return f"({min(ratios):.3f} to {max(ratios):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layer-seconds", default="1e-3,4e-3")
    parser.add_argument("--products", type=int, default=8, help="in half a layer")
    parser.add_argument(
        "--predictors", default="auto,last_step,previous_layer,frequency,expert_map"
    )
    parser.add_argument("--mode", default="observe", choices=["observe", "on"])
    parser.add_argument("--warmup", type=int, default=AUDITION_STEPS + 8, help="steps")
    parser.add_argument("--window", type=int, default=8, help="steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = [
        (name, float(seconds))
        for seconds in options.layer_seconds.split(",")
        for name in options.predictors.split(",")
    ]
    found = [measure(options, *cell) for cell in tqdm(cells, unit="predictor")]
    print(table(found))
    if options.output is not None:
        figures = [msgspec.structs.asdict(its) for its in found]
        options.output.write_text(
            json.dumps(describe_run() | {"figures": figures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
