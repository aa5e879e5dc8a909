"""The experts of a step through frames and a class of packed experts beside them: what the arena could hold.

Frames are the product's own (`ExpertPager`, `ExpertOrder`, the cost-aware values); the packed class is made up. An
expert that comes over the link packed is kept so too, at no cost, where its planned form says so; one that should be
packed and is not comes in the background, one of each layer a step, as FluxMoE staggers its moves. What is decoded goes
into a frame. A frame whose expert is packed as well is worth its decoding, any other one its load: so the
former go first.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.memory.arena import Frames, Geometry
from sglmoe.memory.eviction import Clock
from sglmoe.memory.expert_order import Candidate, ExpertOrder
from sglmoe.memory.expert_pager import ExpertPager
from sglmoe.memory.expert_values import NextUse, Values
from sglmoe.memory.experts import ExpertTable, Load
from sglmoe.memory.packed_order import FrameValues
from sglmoe.memory.packed_share import (
    Form,
    FormCosts,
    PackedSnapshot,
    SlabClass,
    expected_residents,
    plan_packed_share,
    plan_residence_forms,
)
from sglmoe.memory.packed_slabs import PackedSlabs
from sglmoe.memory.prefetches import Prefetches
from sglmoe.memory.prices import Prices
from sglmoe.memory.residency import ExpertUses, MissCurve

# Arbitrary: steps from one plan to the next. The worker's 64 are a fifth of some reference traces.
PLAN_STEPS = 16


class StepCounts(msgspec.Struct, frozen=True):
    """Of one step. Groups are of one wave of one layer: experts that were packed, and that were away."""

    hits: int
    groups: list[tuple[int, int]]
    packed_frames: int
    moves: int  # experts that came packed in the background, to stay so


class PackedClass:
    """Packed experts in runs of frames: who is there, and who gives way to those that should be."""

    def __init__(self, shape: tuple[int, int]):
        self.is_packed: npt.NDArray[np.bool_] = np.zeros(shape, np.bool_)
        self.forms = np.full(shape, Form.AWAY, np.int8)  # that experts should have
        self.num_slots = 0
        self._num_packed = 0
        self._victims: list[tuple[int, int]] = []  # the next to go last
        self._wanted: list[
            tuple[int, int]
        ] = []  # should be here and were not when that was planned

    def follow(self, forms: npt.NDArray[np.int8], num_slots: int, used: Values) -> None:
        """From now on experts should have these forms; those beyond the slots are dropped."""
        self.forms, self.num_slots = forms, num_slots
        packed = np.argwhere(self.is_packed)
        is_planned = forms[self.is_packed] == Form.PACKED
        order = np.lexsort((used[self.is_packed], is_planned))[::-1]
        ranked = [(layer, expert) for layer, expert in packed[order].tolist()]
        self._victims = ranked[int(is_planned.sum()) :]
        for expert in ranked[num_slots:]:
            self._drop(expert)
        self._victims = [expert for expert in self._victims if self.is_packed[expert]]
        wanted = np.argwhere((forms == Form.PACKED) & ~self.is_packed)
        order = np.argsort(-used[(forms == Form.PACKED) & ~self.is_packed], kind="stable")
        self._wanted = [(layer, expert) for layer, expert in wanted[order].tolist()]

    def fill(self) -> int:
        """Bring in those that should be here, at most one of each layer; how many."""
        found: dict[int, tuple[int, int]] = {}
        for expert in self._wanted:
            if not self.is_packed[expert]:
                found.setdefault(expert[0], expert)
        for expert in found.values():
            self._wanted.remove(expert)
            self.offer(expert)
        return len(found)

    def offer(self, expert: tuple[int, int]) -> None:
        """Its packed bytes are at hand."""
        if self.is_packed[expert] or self.forms[expert] != Form.PACKED:
            return
        if self._num_packed == self.num_slots:
            if not self._victims:
                return
            self._drop(self._victims.pop())
        self.is_packed[expert] = True
        self._num_packed += 1

    def _drop(self, expert: tuple[int, int]) -> None:
        self.is_packed[expert] = False
        self._num_packed -= 1

    def violations(self) -> list[str]:
        found = []
        if self.is_packed.sum() != self._num_packed or self._num_packed > self.num_slots:
            found.append(
                f"{self.is_packed.sum()} packed experts, counted {self._num_packed}, in room for {self.num_slots}"
            )
        if any(not self.is_packed[expert] for expert in self._victims):
            found.append("an expert that is not packed is to give way")
        return found


class PackedMemory:
    """`share` of the frames hold packed experts; None: as many as `plan_packed_share` says, from time to time.

    `keeps_ready`: where a layer needs more frames than others can spare, which is a pass over prompts, it takes more waves
    rather than sweep out who should be ready. Without that, and with nothing packed, this is the product.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        geometry: Geometry,
        *,
        floor_frames: int,
        slab: SlabClass | None,
        costs: FormCosts,
        compute_seconds: float = 0.0,
        share: float | None = 0.0,
        keeps_ready: bool = True,
    ):
        self._slab, self._costs, self._share = slab, costs, share
        self._keeps_ready = keeps_ready
        self._compute_seconds = compute_seconds
        self._num_frames, self._floor_frames = geometry.num_frames, floor_frames
        self._frames = Frames(geometry.num_frames)
        self._table = ExpertTable(*shape, frames=self._frames)
        self._uses = NextUse(shape, Prices(geometry))
        self._packed = PackedClass(shape)
        self._packed_frames: list[int] = []
        clock = Clock()
        values = FrameValues(
            self._uses, self._packed.is_packed, lambda: costs.decode_seconds / costs.load_seconds
        )
        self._order = ExpertOrder(self._table, values, clock=clock)
        self._prefetches = Prefetches(
            None,
            table=self._table,
            order=self._order,
            frames=self._frames,
            make_frame=lambda layer, value: False,
            is_packed=self._packed.is_packed,
        )
        self._pager = ExpertPager(
            self._table,
            self._order,
            frames=self._frames,
            slabs=PackedSlabs(self._frames, shape, frame_bytes=geometry.frame_bytes, cell_bytes=0),
            prefetches=self._prefetches,
            make_frame=self._make_frame,
            load_experts=self._load,
        )
        self._groups: list[tuple[int, int]] = []
        self._step = 0

    def run_step(self, layers: Sequence[Sequence[int]]) -> StepCounts:
        """A forward pass whose layers use these experts."""
        self._pager.settle()
        self._prefetches.begin_step()
        self._order.begin_step()
        if self._keeps_ready and self._step % PLAN_STEPS == 0:
            self._plan()
        self._step += 1
        self._groups, hits = [], self._pager.hits
        for layer, experts in enumerate(layers):
            for _ in self._pager.waves(layer, np.asarray(experts, np.intp)):
                pass
        moves = self._packed.fill()  # while layers computed
        return StepCounts(self._pager.hits - hits, self._groups, len(self._packed_frames), moves)

    def violations(self) -> list[str]:
        found = [*self._frames.violations(), *self._table.violations(), *self._packed.violations()]
        if len(self._packed_frames) + self._frames.num_free + self._frames.num_expert != len(
            self._frames
        ):
            found.append("free, ready and packed frames are not all frames")
        return found

    # ----------------------------------------------------------------------------------- the class

    def _plan(self) -> None:
        probability = self._uses.probability()
        now = PackedSnapshot(
            curve=MissCurve(ExpertUses(probability, num_running=1)),
            num_running=1,
            num_frames=self._num_frames,
            floor_frames=self._floor_frames,
            slab=self._slab,
            costs=self._costs,
            compute_seconds=self._compute_seconds,
            packed_frames=len(self._packed_frames),
        )
        self._resize(self._fixed(now) if self._share is not None else self._planned(now))
        ready, packed = expected_residents(now, len(self._packed_frames))
        forms = plan_residence_forms(probability, num_ready=ready, num_packed=packed)
        self._packed.follow(forms, packed_slots(now.slab, len(self._packed_frames)), probability)

    def _planned(self, now: PackedSnapshot) -> int:
        return plan_packed_share(now).packed_frames if self._step else 0  # nothing is known

    def _fixed(self, now: PackedSnapshot) -> int:
        assert self._share is not None
        if now.slab is None:
            return 0
        most = max(0, now.num_frames - now.floor_frames)
        return int(min(self._share * now.num_frames, most)) // now.slab.frames * now.slab.frames

    def _resize(self, num_frames: int) -> None:
        """Frames change hands between steps."""
        while len(self._packed_frames) > num_frames:
            self._frames.give(self._packed_frames.pop())
        while len(self._packed_frames) < num_frames:
            assert self._make_frame(0)
            # `Frames` knows no packed ones: to the others they are as far away as KV.
            self._packed_frames.append(self._frames.take_for_kv())

    def _load(self, loads: Sequence[Load]) -> None:
        experts = [(load.layer, load.expert) for load in loads]
        num_packed = sum(bool(self._packed.is_packed[expert]) for expert in experts)
        self._groups.append((num_packed, len(experts) - num_packed))
        for expert in experts:
            self._packed.offer(expert)

    def _make_frame(self, layer: int) -> bool:
        if self._frames.num_free:
            return True
        first = self._order.first()
        if first is None or (self._goes_on_without(layer) and self._should_stay(first)):
            return False
        self._table.evict(first.layer, first.expert)
        return True

    def _goes_on_without(self, layer: int) -> bool:
        """Whether the layer has experts for a wave already; the others then take another one."""
        return bool(self._table.num_loading[layer] or len(self._table.pinned))

    def _should_stay(self, resident: Candidate) -> bool:
        return bool(self._packed.forms[resident.layer, resident.expert] == Form.READY)


def packed_slots(slab: SlabClass | None, packed_frames: int) -> int:
    """Packed experts that so many frames hold."""
    return 0 if slab is None else packed_frames // slab.frames * slab.experts
