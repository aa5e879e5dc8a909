"""What a model does within a budget: frames, KV, and how fast decoding should be. Pure.

Frames are cut by the server's own functions (`memory/arena.py`), hits and steps predicted by its own
residency model (`memory/residency.py`); only how unevenly experts are used and how fast the machine is
come from here. No prefix is taken to be cached: what running requests leave is the experts'.
"""

from collections.abc import Sequence

import msgspec

from sglmoe.config import DEFAULT_MAX_RUNNING
from sglmoe.decode_graphs import DecodeGraphs, has_padding
from sglmoe.memory.arena import (
    Geometry,
    arena_bytes_within,
    check_floor,
    plan_floor,
    plan_geometry,
)
from sglmoe.memory.residency import (
    MissCurve,
    ResidencySnapshot,
    most_running,
    predict,
)
from sglmoe.memory.staging import decoding_bytes
from sglmoe.plan.cost_model import CostModel
from sglmoe.plan.model_shape import ModelShape
from sglmoe.plan.routing import expert_uses, reference_skew
from sglmoe.units import ceil_div

# Of the experts, beside the KV of as many requests as are asked about.
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)


class Demand(msgspec.Struct, frozen=True):
    """What is assumed of the requests."""

    concurrency: tuple[int, ...] = (1, 8, 32)
    request_tokens: int = 1024  # mean KV of a running request
    skew: float | None = None  # `routing.py`; None is the reference traces'

    def skew_at(self, num_running: float) -> float:
        return reference_skew(num_running) if self.skew is None else self.skew


class DecodeForecast(msgspec.Struct, frozen=True):
    """Decode steps with so many clients."""

    concurrency: int
    num_running: int  # fewer where KV has no room for more
    expert_frames: int
    hit_ratio: float  # of the experts that a step uses
    loads: float  # experts that it loads
    step_seconds: float
    tokens_per_second: float


class BudgetPlan(msgspec.Struct, frozen=True):
    """A budget, and what it gives."""

    budget_bytes: int
    host_bytes: int  # --host-memory
    block_bytes: int = 0  # what an expert takes of that
    geometry: Geometry | None = None
    floor_frames: int = 0  # never taken by KV
    kv_tokens: int = 0  # at most: where experts have but their floor
    resident_ratio: float = 0.0  # of the experts, while nothing runs
    forecasts: tuple[DecodeForecast, ...] = ()
    refusal: str = ""  # why a server would not start


class PlanSnapshot(msgspec.Struct, frozen=True):
    """What a plan is made from."""

    shape: ModelShape
    costs: CostModel
    demand: Demand
    page_cache_bytes: int = 0  # that keeps experts beside --host-memory; on a CPU
    page_tokens: int | None = None
    max_running: int = DEFAULT_MAX_RUNNING
    graphs: DecodeGraphs = DecodeGraphs()
    on_gpu: bool = False
    # Of KV, beside which there are to be frames for steps without the host; None where these need no such care.
    context_tokens: int | None = None
    stored_bytes: int = 0  # of the largest expert, where a GPU decodes packed ones

    @property
    def block_bytes(self) -> int:
        """What an expert takes of host memory."""
        return self.stored_bytes or self.shape.expert_bytes

    @property
    def decoding_bytes(self) -> int:
        """What decoding packed experts takes of the device beside their frames."""
        return decoding_bytes(self.stored_bytes) if self.stored_bytes else 0


def plan_budget(now: PlanSnapshot, budget_bytes: int, host_bytes: int) -> BudgetPlan:
    """What a server would make of these two flags."""
    try:
        geometry = geometry_of(now, budget_bytes)
    except ValueError as error:
        return BudgetPlan(budget_bytes, host_bytes, refusal=str(error))
    shape, floor_frames = now.shape, floor_of(now, geometry)
    forecasts = (
        forecast(now, geometry, host_bytes, concurrency) for concurrency in now.demand.concurrency
    )
    return BudgetPlan(
        budget_bytes=budget_bytes,
        host_bytes=host_bytes,
        block_bytes=now.block_bytes,
        geometry=geometry,
        floor_frames=floor_frames,
        kv_tokens=geometry.kv_tokens(floor_frames),
        resident_ratio=min(1.0, geometry.num_frames / shape.all_experts)
        if shape.num_experts
        else 1.0,
        forecasts=tuple(forecasts),
    )


def geometry_of(now: PlanSnapshot, budget_bytes: int) -> Geometry:
    """The server's arena. Raises ValueError, with numbers and flag, where the budget is too small."""
    arena_bytes = arena_bytes_within(
        budget_bytes,
        now.shape.dense_bytes,
        decoding_bytes=now.decoding_bytes,
        graph_bytes=now.graphs.reserved_bytes,
    )
    geometry = _cut(now, arena_bytes)
    check_floor(geometry, floor_of(now, geometry))
    return geometry


def floor_of(now: PlanSnapshot, geometry: Geometry) -> int:
    """See `plan_floor`."""
    shape = now.shape
    return plan_floor(
        geometry,
        num_layers=shape.num_moe_layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        context_tokens=now.context_tokens,
    )


def _cut(now: PlanSnapshot, arena_bytes: int) -> Geometry:
    return plan_geometry(
        arena_bytes=arena_bytes,
        expert_bytes=now.shape.expert_bytes,
        token_bytes=now.shape.token_bytes,
        token_rows=now.shape.token_rows,
        page_tokens=now.page_tokens,
        has_padding=has_padding(now.graphs, on_gpu=now.on_gpu),
    )


def forecast(
    now: PlanSnapshot, geometry: Geometry, host_bytes: int, concurrency: int
) -> DecodeForecast:
    """The middle of the requests' lives: each holds `request_tokens`."""
    shape, demand = now.shape, now.demand
    curve = MissCurve(
        expert_uses(
            max(1, shape.num_moe_layers),
            shape.num_experts,
            shape.top_k,
            demand.skew_at(concurrency),
        )
    )
    residency = ResidencySnapshot(
        num_frames=geometry.num_frames,
        floor_frames=floor_of(now, geometry),
        pages_per_frame=geometry.pages_per_frame,
        pages_per_request=ceil_div(demand.request_tokens, geometry.page_tokens),
        num_running=concurrency,
        max_running=now.max_running,
        curve=curve,
        model=None,
    )
    num_running = min(concurrency, most_running(residency))
    num_used = curve.misses(num_running, 0)  # with no frames at all
    num_blocks = host_bytes // now.block_bytes if shape.num_experts else 0
    host_ratio = tier_ratio(shape, geometry.num_frames, num_blocks, now.page_cache_bytes)
    step = predict(residency, now.costs.model(num_running, num_used, host_ratio), num_running)
    return DecodeForecast(
        concurrency=concurrency,
        num_running=num_running,
        expert_frames=step.expert_frames,
        hit_ratio=max(0.0, 1 - step.misses / num_used) if num_used else 1.0,
        loads=step.misses,
        step_seconds=step.step_seconds,
        tokens_per_second=step.tokens_per_second,
    )


def tier_ratio(shape: ModelShape, num_frames: int, num_blocks: int, page_cache_bytes: int) -> float:
    """Of the experts in no frame, those in host memory or the page cache; the rest is read from disk.

    Host memory is taken to hold experts that the frames lack, the page cache any of them.
    """
    missing = shape.all_experts - num_frames
    if missing <= 0:
        return 1.0
    in_blocks = min(1.0, num_blocks / missing)
    in_cache = min(1.0, page_cache_bytes / shape.all_expert_bytes)
    return 1 - (1 - in_blocks) * (1 - in_cache)


def budgets_to_try(now: PlanSnapshot) -> Sequence[int]:
    """Shares of the experts, each beside the KV of the most requests that are asked about; in bytes."""
    shape, demand = now.shape, now.demand
    any_arena = _cut(now, 2**62)
    frame_tokens = any_arena.pages_per_frame * any_arena.page_tokens
    kv_frames = ceil_div(max(demand.concurrency) * demand.request_tokens, frame_tokens)
    frames = [
        max(shape.floor_frames, round(share * shape.all_experts)) + kv_frames for share in SHARES
    ]
    beside = shape.dense_bytes + now.decoding_bytes + now.graphs.reserved_bytes
    beside += any_arena.padding_bytes
    return [beside + count * any_arena.frame_bytes for count in dict.fromkeys(frames)]


def whole_bytes(now: PlanSnapshot) -> int:
    """The budget in which nothing is ever missing, with as many requests as are asked about."""
    return budgets_to_try(now)[-1]
