"""Everything that holds frames of the arena, and what compares and loads it: put together, nothing decided."""

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Frames, Geometry
from sglmoe.memory.eviction import Clock, LeafOrder
from sglmoe.memory.evictor import Evictor
from sglmoe.memory.expert_order import ExpertOrder
from sglmoe.memory.expert_pager import ExpertPager
from sglmoe.memory.expert_values import ExpertValues, values_for
from sglmoe.memory.experts import ExpertTable
from sglmoe.memory.frame_lender import FrameLender
from sglmoe.memory.kv_pages import PagePool
from sglmoe.memory.link_gate import LoadExperts
from sglmoe.memory.packed_order import FrameValues, PackedOrder, Packing
from sglmoe.memory.packed_slabs import PackedSlabs
from sglmoe.memory.prefetch import BackgroundLoader
from sglmoe.memory.prefetches import Prefetches
from sglmoe.memory.prices import Prices
from sglmoe.memory.radix_cache import RadixCache, RadixNode
from sglmoe.memory.reuse_rates import ReuseRates


class Tenants:
    """One of each. `shape`: layers and experts in each; `layer_frames`: of each layer, with MemoryPolicy.STATIC."""

    def __init__(
        self,
        geometry: Geometry,
        policy: MemoryPolicy,
        shape: tuple[int, int],
        *,
        floor_frames: int,
        layer_frames: int,
        packing: Packing,
    ):
        self._streams_layers = policy is MemoryPolicy.COST_AWARE and shape[1] > 0
        self.clock, self.prices, self.reuse = Clock(), Prices(geometry), ReuseRates()
        self.frames = Frames(geometry.num_frames)
        self.pool = PagePool(
            self.frames,
            pages_per_frame=geometry.pages_per_frame,
            max_frames=geometry.num_frames - floor_frames,
        )
        self.leaves: LeafOrder[RadixNode] = LeafOrder(policy, reuse=self.reuse, prices=self.prices)
        self.cache = RadixCache(
            page_tokens=geometry.page_tokens, order=self.leaves, clock=self.clock, reuse=self.reuse
        )
        self.table = ExpertTable(*shape, frames=self.frames)
        self.slabs = PackedSlabs(
            self.frames, shape, frame_bytes=geometry.frame_bytes, cell_bytes=packing.expert_bytes
        )
        values = values_for(policy, shape, clock=self.clock, prices=self.prices)
        self.packed = PackedOrder(self.slabs, values, packing, frames=self.frames, clock=self.clock)
        self.experts = ExpertOrder(
            self.table, frame_values(values, self.slabs, packing), clock=self.clock
        )
        self._layer_frames = layer_frames
        self.evictor = Evictor(
            policy,
            frames=self.frames,
            pool=self.pool,
            cache=self.cache,
            leaves=self.leaves,
            table=self.table,
            experts=self.experts,
            slabs=self.slabs,
            packed=self.packed,
            layer_frames=layer_frames,
            pages_per_frame=geometry.pages_per_frame,
            drop_prefetch=lambda: self.prefetches.drop_last(),
        )

    def load_with(self, load_experts: LoadExperts, background: BackgroundLoader | None) -> None:
        """What brings experts in: for layers that wait, and for those ahead."""
        self.prefetches = Prefetches(
            background,
            table=self.table,
            order=self.experts,
            frames=self.frames,
            make_frame=self._make_spare_frame,
            is_packed=self.slabs.is_packed,
        )
        self.pager = ExpertPager(
            self.table,
            self.experts,
            frames=self.frames,
            slabs=self.slabs,
            prefetches=self.prefetches,
            make_frame=self.evictor.make_frame,
            load_experts=load_experts,
            stream_prices=self.prices if self._streams_layers else None,
        )
        self.lender = FrameLender(
            self.table,
            self.experts,
            frames=self.frames,
            evictor=self.evictor,
            pager=self.pager,
            prefetches=self.prefetches,
            layer_frames=self._layer_frames,
        )

    def _make_spare_frame(self, layer: int, value: float) -> bool:
        if self.frames.are_lent:
            return self.lender.has_spare(layer)
        return self.evictor.make_spare_frame(layer, value)


def frame_values(values: ExpertValues, slabs: PackedSlabs, packing: Packing) -> ExpertValues:
    """Of experts in frames, some of which are packed too."""
    if not packing.expert_bytes:
        return values
    return FrameValues(values, slabs.is_packed, packing.decode_ratio)
