"""The owner of the arena, and who it works with: host memory, copiers, and what tells steps without the host of prefetches."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from sglmoe.config import EngineConfig, PrefetchMode
from sglmoe.decode_graphs import DecodeGraphs
from sglmoe.memory.arena import Geometry
from sglmoe.memory.background_copier import BackgroundCopier
from sglmoe.memory.device_decode import can_decode
from sglmoe.memory.device_transfer import page_lock
from sglmoe.memory.experts import ABSENT
from sglmoe.memory.host_tier import HostTier, make_blocks
from sglmoe.memory.link_gate import LinkGate
from sglmoe.memory.load_timer import Timer, device_copy_seconds, new_timer
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.packed_order import Packing
from sglmoe.memory.promoter import Promoter
from sglmoe.memory.store import ExpertStore
from sglmoe.units import show_bytes
from sglmoe.worker.expert_copiers import expert_copiers
from sglmoe.worker.moe_layer import PagedExperts
from sglmoe.worker.packed_experts import plan_packing
from sglmoe.worker.step_messages import Letters

logger = logging.getLogger(__name__)


class Owned(NamedTuple):
    """The owner of the arena, and who it works with."""

    memory: MemoryManager
    tier: HostTier
    packing: Packing
    letters: Letters | None  # where prefetches are told to steps that run without the host


def manage(
    frames: torch.Tensor,
    geometry: Geometry,
    experts: PagedExperts,
    *,
    floor_frames: int,
    config: EngineConfig,
    graphs: DecodeGraphs,
) -> Owned:
    """The owner of the arena, and below it host memory, which fills in the background from now on.

    `frames`: the arena's, uint8 `[num_frames * frame_bytes]`.
    """
    num_layers = len(experts.layer_ids)
    num_experts = experts.shape.num_experts if experts.shape else 0
    store = experts.store
    tier = make_tier(experts, config.host_memory_bytes, geometry, is_cpu=frames.is_cpu)
    demand = LinkGate()
    prefetch = LinkGate(above=demand)
    copiers = expert_copiers(frames, geometry, store, tier, packs=config.packed_share != 0.0)
    packing = plan_packing(
        store,
        config.packed_share,
        copiers.decode_ratio,
        frame_bytes=geometry.frame_bytes,
        time_decoding=copiers.time_decoding,
    )
    letters = None
    if graphs.is_full and num_experts and config.expert_prefetch is not PrefetchMode.OFF:
        letters = Letters(num_layers, num_experts, frames.device.type, copiers.mark)
    background = None
    if num_experts:
        background = BackgroundCopier(
            copiers.ahead,
            demand=demand,
            prefetch=prefetch,
            mark=letters.mark if letters else copiers.mark,
            came=letters.came if letters else None,
        )
    memory = MemoryManager(
        geometry,
        num_layers=num_layers,
        num_experts=num_experts,
        floor_frames=floor_frames,
        load_experts=demand.guard(copiers.load),
        background=background,
        policy=config.memory_policy,
        expert_ratio=config.expert_ratio,
        host_counters=tier.counters,
        packing=packing,
    )
    if len(tier.blocks):
        if not frames.is_cpu:
            frame = frames[: geometry.frame_bytes]
            measure_link(memory, frame, torch.from_numpy(tier.blocks[0]))
        new_promoter(tier, store, prefetch, memory).start()
    return Owned(memory, tier, packing, letters)


def new_promoter(
    tier: HostTier, store: ExpertStore, gate: LinkGate, memory: MemoryManager
) -> Promoter:
    """What fills host memory with those that frames want and have not got."""
    return Promoter(
        tier,
        store,
        gate,
        heat=lambda: memory.expert_demand,
        residents=lambda: memory.frame_table != ABSENT,
    )


def measure_link(
    memory: MemoryManager,
    frame: torch.Tensor,
    block: torch.Tensor,
    new_timer: Callable[[], Timer] = new_timer,
) -> None:
    """Have memory reckon with what the link to the device moves, instead of what is assumed, until steps have told more.

    `frame`: one without a tenant; `block`: of host memory, page-locked. For a device, which says of no load how long it took.
    """
    seconds = device_copy_seconds(frame, block, new_timer)
    logger.info("host memory to device: %s a second", show_bytes(int(len(block) / seconds)))
    memory.set_prices(
        expert_nanoseconds=max(1, round(1e9 * seconds)),
        token_nanoseconds=memory.prices.token_nanoseconds,
    )


def make_tier(
    experts: PagedExperts, host_bytes: int, geometry: Geometry, *, is_cpu: bool
) -> HostTier:
    """Host memory for experts, empty: page-locked where a GPU reads it."""
    store = experts.store
    as_stored = store.is_packed if is_cpu else can_decode(store, geometry.frame_bytes)
    blocks = make_blocks(
        host_bytes, store, as_stored=as_stored, lock_pages=None if is_cpu else page_lock
    )
    num_experts = experts.shape.num_experts if experts.shape else 0
    return HostTier(
        blocks,
        num_layers=len(experts.layer_ids),
        num_experts=num_experts,
        as_stored=as_stored,
    )
