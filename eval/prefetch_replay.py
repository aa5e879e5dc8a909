"""Replay routing traces with prefetching, on a link that is only simulated.

    python -m eval.prefetch_replay TRACE.npz [...] [--expert-frames 25%,50%] [--bandwidth 16GB,1GB]

What is replayed is the product's own code: memory manager, predictors and their calibration, prefetch
plans, the horizon. Only the clock and the link are not real (`eval.simulated_link`). A layer computes
for `--layer-seconds`, for `--attention-ratio` of that before its router chooses. All frames are for
experts. Every policy runs with each of the predictors, if it uses one; beside them Belady's MIN, the
bound of what loads on demand.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from eval.oracle import oracle_counts
from eval.prefetch_report import Outcome, plot, save, table
from eval.replay import describe, frames_of
from eval.replay_predictors import BOUNDS, Material, forecast_by, predictors_by
from eval.replay_prefetcher import (
    POLICIES,
    Planner,
    Policy,
    Prefetcher,
    ServersPrefetcher,
    Setting,
)
from eval.servers import describe_run
from eval.simulated_link import LinkSpeed, SimulatedLink
from sglmoe.config import AUTO, PREDICTORS, MemoryPolicy
from sglmoe.demo_model import DEMO_MODEL
from sglmoe.memory.arena import Geometry
from sglmoe.memory.experts import ABSENT
from sglmoe.memory.manager import MemoryManager
from sglmoe.prediction.advisor import Advisor
from sglmoe.prediction.baselines import Frequency
from sglmoe.prediction.predictor import LayerRouting, StepTokens
from sglmoe.prediction.trace import Kind, Trace, load_trace
from sglmoe.units import parse_bytes

BELADY = "belady"
ADAPTIVE = "adaptive"


class PrefetchReplay:
    """A trace's steps through one memory and one link. Without a `prefetcher`, on demand alone."""

    def __init__(
        self, trace: Trace, setting: Setting, policy: MemoryPolicy, *, streams_layers: bool = False
    ) -> None:
        info = trace.info
        geometry: Geometry = msgspec.structs.replace(info.geometry, num_frames=setting.num_frames)
        self._trace = trace
        self._setting = setting
        self._layers = trace.experts_by_layer()
        self._released = released_after(trace)
        self.link = SimulatedLink(setting.speed, expert_bytes=setting.expert_bytes)
        self.memory = MemoryManager(
            geometry,
            num_layers=info.num_layers,
            num_experts=info.num_experts,
            floor_frames=info.floor_frames,
            load_experts=self.link.load,
            policy=policy,
            background=self.link,
        )
        self.memory.pause_streaming(not streams_layers)
        self.prefetcher: Prefetcher | None = None
        self._gate_inputs: npt.NDArray[np.float32] | None = None  # [T, layers, hidden]

    def use(self, predictor: str, material: Material, policy: Policy) -> None:
        """Prefetch by what has that name; see `predictors_by`."""
        setting, memory = self._setting, self.memory
        if policy.is_advised:
            frequency = partial(Frequency, material.sources.parts)
            advisor = Advisor(
                predictors_by(predictor, material),
                frequency(),
                frame_table=memory.frame_table,
                fallback=frequency,
            )
            self.prefetcher = ServersPrefetcher(advisor, setting, memory=memory)
        else:
            forecast = forecast_by(predictor, material)
            self.prefetcher = Planner(policy, setting, forecast, memory=memory, link=self.link)
        if self.prefetcher.wants_gate_input:
            self._gate_inputs = material.gate_inputs

    def run(self) -> None:
        for step in range(self._trace.num_steps):
            self.step(step)

    def step(self, step: int) -> None:
        """One forward pass."""
        trace, setting, prefetcher = self._trace, self._setting, self.prefetcher
        tokens = slice(*trace.step_bounds[step : step + 2].tolist())
        self.memory.begin_step(tokens.stop - tokens.start)
        if prefetcher is not None:
            owners = trace.owners[tokens]
            prefetcher.begin_step(
                StepTokens(trace.token_ids[tokens], trace.positions[tokens], owners)
            )
        for layer, experts in enumerate(self._layers[step]):
            self.link.compute(setting.layer_seconds * setting.attention_ratio)
            inputs = self._gate_inputs
            routing = LayerRouting(
                layer,
                trace.expert_ids[tokens, layer],
                trace.probabilities[tokens, layer],
                inputs if inputs is None else inputs[tokens, layer],
            )
            self._run_experts(experts, routing)
        if prefetcher is not None:
            for owner in self._released[step]:
                prefetcher.forget(owner)

    def _run_experts(self, experts: Sequence[int], routing: LayerRouting) -> None:
        """What is planned from a layer's routing is begun when its last wave is."""
        setting, prefetcher = self._setting, self.prefetcher
        seconds = setting.layer_seconds * (1 - setting.attention_ratio)
        was_absent = self.memory.frame_table[routing.layer] == ABSENT
        num_left = len(experts)
        for wave in self.memory.waves(routing.layer, experts):
            num_left -= len(wave)
            if prefetcher is not None and not num_left and not setting.applies_late:
                prefetcher.observe(routing, was_absent=was_absent, num_pinned=len(wave))
            self.link.compute(seconds * len(wave) / len(experts))
        if prefetcher is not None and setting.applies_late:
            prefetcher.observe(routing, was_absent=was_absent, num_pinned=0)

    def outcome(self, policy: str, predictor: str | None) -> Outcome:
        counters, link = self.memory.snapshot(0), self.link
        horizons = self.prefetcher.horizons if self.prefetcher is not None else []
        return Outcome(
            policy=policy,
            predictor=predictor,
            num_frames=self._setting.num_frames,
            bytes_per_second=self._setting.speed.bytes_per_second,
            hits=counters.expert_hits,
            misses=counters.expert_misses,
            seconds=link.now,
            compute_seconds=link.compute_seconds,
            busy_seconds=link.busy_seconds,
            bytes_moved=link.bytes_moved,
            prefetches_begun=counters.prefetches_begun,
            prefetches_used=counters.prefetches_used,
            prefetches_late=counters.prefetches_late,
            prefetches_wasted=counters.prefetches_wasted,
            mean_horizon=float(np.mean(horizons)) if horizons else 0.0,
        )


def released_after(trace: Trace) -> dict[int, list[int]]:
    """Step -> the requests that were released before the next one."""
    released: dict[int, list[int]] = defaultdict(list)
    step = 0
    for kind, number, *_ in trace.operations.tolist():
        if kind == Kind.FORWARD:
            step = number
        elif kind == Kind.RELEASE:
            released[step].append(number)
    return released


# ------------------------------------------------------------------------------------------- cells


def replay(material: Material, setting: Setting, policy: str, predictor: str | None) -> Outcome:
    """One policy, with one predictor if it uses any."""
    if policy == BELADY:
        return belady(material.trace, setting)
    its = POLICIES[policy]
    run = PrefetchReplay(material.trace, setting, its.memory, streams_layers=its.streams_layers)
    if predictor is not None:
        run.use(predictor, material, its)
    run.run()
    return run.outcome(policy, predictor)


def belady(trace: Trace, setting: Setting) -> Outcome:
    """What no order of eviction can beat as long as all is loaded on demand."""
    hits, misses, groups = oracle_counts(trace.experts_by_layer(), setting.num_frames)
    num_bytes = misses * trace.info.geometry.expert_bytes
    speed = setting.speed
    stall_seconds = groups * speed.latency_seconds + num_bytes / speed.bytes_per_second
    compute_seconds = trace.num_steps * trace.info.num_layers * setting.layer_seconds
    return Outcome(
        policy=BELADY,
        num_frames=setting.num_frames,
        bytes_per_second=speed.bytes_per_second,
        hits=hits,
        misses=misses,
        seconds=compute_seconds + stall_seconds,
        compute_seconds=compute_seconds,
        busy_seconds=stall_seconds,
        bytes_moved=num_bytes,
    )


def cells(options: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    """Policies, each with every predictor that it can use."""
    for policy in options.policies.split(","):
        if policy == BELADY or not POLICIES[policy].expects:
            yield policy, None
            continue
        for predictor in options.predictors.split(","):
            if predictor != AUTO or POLICIES[policy].is_advised:
                yield policy, predictor


def settings(options: argparse.Namespace, trace: Trace) -> Iterator[Setting]:
    info = trace.info
    expert_bytes = info.geometry.expert_bytes
    for frames, bandwidth, horizon in product(
        options.expert_frames.split(","), options.bandwidth.split(","), options.horizon.split(",")
    ):
        speed = LinkSpeed(
            bytes_per_second=parse_bytes(bandwidth, whole_bytes=0),
            latency_seconds=options.latency,
            chunk_bytes=math.ceil(expert_bytes / options.chunks),
        )
        yield Setting(
            num_frames=max(
                frames_of(frames, info.num_layers * info.num_experts), info.floor_frames + 1
            ),
            expert_bytes=expert_bytes,
            speed=speed,
            layer_seconds=options.layer_seconds,
            attention_ratio=options.attention_ratio,
            applies_late=options.late,
            min_probability=options.min_probability,
            horizon_layers=None if horizon == ADAPTIVE else int(horizon),
            queue_layers=options.queue_layers,
        )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--expert-frames", default="10%,25%,50%,75%")
    parser.add_argument("--policies", default=f"lru,cost-aware,{BELADY},cost-aware+prefetch")
    parser.add_argument(
        "--predictors", default="last_step,oracle", help="names, or .json of trained ones"
    )
    # An expert of the demo model takes 4 us, 50 us or 198 us, of a layer's 200 us.
    parser.add_argument("--bandwidth", default="16GB,1GB,250MB", help="bytes a second")
    parser.add_argument("--latency", type=float, default=1e-6, help="seconds, of each transfer")
    parser.add_argument("--layer-seconds", type=float, default=200e-6)
    parser.add_argument("--attention-ratio", type=float, default=0.5)
    parser.add_argument("--chunks", type=int, default=3, help="in which an expert moves")
    parser.add_argument(
        "--late",
        action="store_true",
        help="begin what a layer's routing asks for when it has ended",
    )
    parser.add_argument("--min-probability", type=float, default=0.05)
    parser.add_argument("--horizon", default=ADAPTIVE, help="layers, or adaptive")
    parser.add_argument("--queue-layers", type=float, default=1.0, help="of time to load in")
    parser.add_argument("--model-path", type=Path, default=DEMO_MODEL, help="for its embeddings")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--plot", type=Path, help="PNG file")
    options = parser.parse_args(arguments)
    predictors = [name for name in options.predictors.split(",") if not name.endswith(".json")]
    for names, known in (
        (options.policies.split(","), [*POLICIES, BELADY]),
        (predictors, [*BOUNDS, *PREDICTORS]),
    ):
        if unknown := set(names).difference(known):
            parser.error(f"{', '.join(sorted(unknown))}: there is {', '.join(known)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    outcomes: dict[str, list[Outcome]] = {}
    for path in options.traces:
        trace = load_trace(path)
        material = Material(trace, options.model_path)
        work = [*product(settings(options, trace), cells(options))]
        progress = tqdm(work, path.stem, unit="replay")
        outcomes[path.stem] = [replay(material, setting, *cell) for setting, cell in progress]
        print(f"\n{describe(path, trace)}\n{table(outcomes[path.stem])}")
    if options.output is not None:
        save(outcomes, describe_run(), options.output)
    if options.plot is not None:
        plot(outcomes, options.plot)


if __name__ == "__main__":
    main()
