"""Who tells memory what to expect and what to prefetch, in a replay."""

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from eval.simulated_link import LinkSpeed, SimulatedLink
from sglmoe.config import MemoryPolicy
from sglmoe.memory.experts import ABSENT
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.prefetch import Wanted
from sglmoe.prediction.advisor import Advisor, LinkTimes
from sglmoe.prediction.forecast import Forecast
from sglmoe.prediction.horizon import Horizon, expected_loads
from sglmoe.prediction.predictor import LayerRouting, Scores, StepTokens
from sglmoe.prediction.prefetch import PrefetchSnapshot, loads_to_begin, plan_frames, plan_prefetch

Mask = npt.NDArray[np.bool_]


class Policy(msgspec.Struct, frozen=True):
    """What memory does with a forecast."""

    memory: MemoryPolicy
    expects: bool = False  # what is expected counts when something has to give way
    prefetches: bool = False
    splits_frames: bool = False  # prefetches what has frames by PLEC
    is_advised: bool = False  # by the server's own advisor
    streams_layers: bool = False  # in passes that use most experts


POLICIES = {
    "lru": Policy(MemoryPolicy.LRU),
    "lfu": Policy(MemoryPolicy.LFU),
    "cost-aware": Policy(MemoryPolicy.COST_AWARE),
    "cost-aware+stream": Policy(MemoryPolicy.COST_AWARE, streams_layers=True),
    "cost-aware+expect": Policy(MemoryPolicy.COST_AWARE, expects=True),
    "cost-aware+prefetch": Policy(MemoryPolicy.COST_AWARE, expects=True, prefetches=True),
    "lru+prefetch": Policy(MemoryPolicy.LRU, expects=True, prefetches=True),
    "lfu+prefetch": Policy(MemoryPolicy.LFU, expects=True, prefetches=True),
    "server": Policy(MemoryPolicy.COST_AWARE, expects=True, prefetches=True, is_advised=True),
    "plec": Policy(MemoryPolicy.COST_AWARE, expects=True, prefetches=True, splits_frames=True),
}


class Setting(msgspec.Struct, frozen=True):
    """What is the same for all that are compared."""

    num_frames: int
    expert_bytes: int
    speed: LinkSpeed
    layer_seconds: float  # of computing
    attention_ratio: float  # of these, before the layer's experts are known
    applies_late: bool  # plans made from a layer's routing wait until the layer has ended
    min_probability: float  # of what is prefetched
    horizon_layers: int | None  # None: as `Horizon` says
    queue_layers: float = 1.0  # on their way are so many as the link moves while these compute

    @property
    def expert_seconds(self) -> float:
        """For one by itself."""
        return self.speed.seconds(self.expert_bytes)


class Prefetcher(Protocol):
    """Is told of each step and layer, and acts at once."""

    horizons: list[int]  # of each step

    @property
    def wants_gate_input(self) -> bool:
        """Whether any of its predictors does."""

    def begin_step(self, tokens: StepTokens) -> None:
        """After memory has begun the step."""

    def observe(self, routing: LayerRouting, *, was_absent: Mask, num_pinned: int) -> None:
        """The layer has chosen its experts; those were in no frame before, and so many are pinned now."""

    def forget(self, owner: int) -> None:
        """The request has ended."""


class EndedPrefetches:
    """How many were late, and how many were wasted, since this was last asked."""

    def __init__(self, memory: MemoryManager):
        self._memory = memory
        self._seen = (0, 0)

    def new(self) -> tuple[int, int]:
        snapshot, before = self._memory.snapshot(0), self._seen
        self._seen = (snapshot.prefetches_late, snapshot.prefetches_wasted)
        return self._seen[0] - before[0], self._seen[1] - before[1]


class Planner:
    """Any policy, from one forecast."""

    def __init__(
        self,
        policy: Policy,
        setting: Setting,
        forecast: Forecast,
        *,
        memory: MemoryManager,
        link: SimulatedLink,
    ):
        self._policy = policy
        self._setting = setting
        self._forecast = forecast
        self._memory = memory
        self._link = link
        self._num_layers = len(memory.frame_table)
        self._adaptive = Horizon(self._num_layers)
        self._ended = EndedPrefetches(memory)
        self.horizons: list[int] = []

    @property
    def wants_gate_input(self) -> bool:
        return self._forecast.wants_gate_input

    def begin_step(self, tokens: StepTokens) -> None:
        self._forecast.begin_step(tokens)
        if self._policy.prefetches:
            self._adapt()
        self.look_ahead(-1, num_pinned=0)

    def observe(self, routing: LayerRouting, *, was_absent: Mask, num_pinned: int) -> None:
        self._forecast.observe(routing)
        self.look_ahead(routing.layer, num_pinned=num_pinned)

    def look_ahead(self, layer: int, *, num_pinned: int) -> None:
        probabilities = self._forecast.probabilities()
        self._memory.expect(layer, probabilities)
        if self._policy.prefetches:
            self._memory.prefetch(self._plan(layer, probabilities, num_pinned))

    def forget(self, owner: int) -> None:
        self._forecast.forget(owner)

    @property
    def _horizon(self) -> int:
        return self._setting.horizon_layers or self._adaptive.layers

    def _adapt(self) -> None:
        """Bring the horizon up to date, from the step before and what is expected of this one."""
        late, unused = self._ended.new()
        self._adaptive.note(late=late, unused=unused)
        self._adaptive.update(
            expected_loads(self._forecast.probabilities(), self._memory.frame_table != ABSENT),
            expert_seconds=self._setting.expert_seconds,
            layer_seconds=self._setting.layer_seconds,
        )
        self.horizons.append(self._horizon)

    def _plan(self, layer: int, probabilities: Scores, num_pinned: int) -> Sequence[Wanted]:
        is_here = self._memory.frame_table != ABSENT
        for load in self._link.on_their_way():
            is_here[load.layer, load.expert] = True
        snapshot = PrefetchSnapshot(
            layer=-1 if layer + 1 == self._num_layers else layer,
            probabilities=probabilities,
            is_resident=is_here,
            horizon=self._horizon,
            num_loads=loads_to_begin(
                self._link.num_queued,
                expert_seconds=self._setting.expert_seconds,
                layer_seconds=self._setting.queue_layers * self._setting.layer_seconds,
            ),
            min_probability=self._setting.min_probability,
        )
        if self._policy.splits_frames:
            return plan_frames(snapshot, self._setting.num_frames - num_pinned).wanted
        return plan_prefetch(snapshot)


class ServersPrefetcher:
    """What the server does, if its predictor needs no time."""

    def __init__(self, advisor: Advisor, setting: Setting, *, memory: MemoryManager):
        self._memory = memory
        self._advisor = advisor
        self._times = LinkTimes(setting.expert_seconds, setting.layer_seconds)
        self._ended = EndedPrefetches(memory)
        self._step = 0
        self.horizons: list[int] = []
        self.wants_gate_input = self._advisor.wants_gate_input

    def begin_step(self, tokens: StepTokens) -> None:
        late, unused = self._ended.new()
        self._advisor.begin_step(self._step, tokens, self._times, late=late, unused=unused)
        self._step += 1
        self.horizons.append(self._advisor.horizon.layers)
        self._look_ahead()

    def observe(self, routing: LayerRouting, *, was_absent: Mask, num_pinned: int) -> None:
        self._advisor.observe(routing, was_absent=was_absent)
        self._look_ahead()

    def forget(self, owner: int) -> None:
        self._advisor.forget(owner)

    def _look_ahead(self) -> None:
        outlook = self._advisor.outlook()
        self._memory.expect(outlook.layer, outlook.probabilities)
        limit = loads_to_begin(self._memory.num_on_their_way, **msgspec.structs.asdict(self._times))
        self._memory.prefetch(outlook.wanted, limit)
