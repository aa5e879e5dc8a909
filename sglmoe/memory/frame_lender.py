"""Lends frames to a step that runs without the host, and learns from what it gives back who came, went and was used."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from sglmoe.memory.arena import Frames
from sglmoe.memory.evictor import Evictor
from sglmoe.memory.expert_order import ExpertOrder
from sglmoe.memory.expert_pager import ExpertPager
from sglmoe.memory.experts import ABSENT, ExpertTable
from sglmoe.memory.frame_sets import (
    USED,
    Counts,
    FrameSets,
    Places,
    lay_out,
    plan_quotas,
    plan_sizes,
)
from sglmoe.memory.prefetches import Prefetches
from sglmoe.units import ceil_div

IsPlace: TypeAlias = npt.NDArray[np.bool_]  # [num_layers, num_experts], of the places of sets

QUOTA_STEPS = 16  # arbitrary: what experts are worth changes little in so many steps
# Arbitrary: of the frames that sets can have, one in so many at most is kept for prefetches.
FRAMES_PER_SPARE = 16


class FrameLender:
    """Sets do not outlive a step: they are laid out from what memory knows, and memory knows all when they are back.

    `layer_frames`: what each layer may have with MemoryPolicy.STATIC; 0 with others.
    """

    def __init__(
        self,
        table: ExpertTable,
        order: ExpertOrder,
        *,
        frames: Frames,
        evictor: Evictor,
        pager: ExpertPager,
        prefetches: Prefetches,
        layer_frames: int,
    ):
        self._table = table
        self._order = order
        self._frames = frames
        self._evictor = evictor
        self._pager = pager
        self._prefetches = prefetches
        self._layer_frames = layer_frames
        self._num_layers, self._num_experts = table.frame_table.shape
        self._lent: FrameSets | None = None
        self._misses: Counts = np.zeros(self._num_layers, np.intp)  # of the last step
        self._quotas: Counts | None = None
        self._quota_age = 0  # steps

    def lend(self, least: int, num_ahead: int) -> FrameSets | None:
        """See `MemoryManager.lend`."""
        assert self._lent is None, "frames are lent already"
        self._pager.settle()
        self._prefetches.land()
        least = min(least, self._num_experts)
        if not self._make_least(least):
            return None
        self._make_way()
        sizes = self._plan_sizes(least, self._num_spare(least, num_ahead))
        for layer in np.flatnonzero(sizes < self._table.num_resident).tolist():
            self._evictor.shrink(layer, int(sizes[layer]))
        num_empty = int(sizes.sum()) - sum(self._table.num_resident)
        free_frames = np.array(self._frames.lend(num_empty), np.int32)
        self._lent = lay_out(self._table.frame_table, self._order.now(), sizes, free_frames)
        return self._lent

    def has_spare(self, layer: int) -> bool:
        """While frames are lent: whether a prefetch may have one, which may join the layer's set."""
        assert self._lent is not None
        num_places = int(self._lent.sizes[layer]) + self._table.num_loading[layer]
        return num_places < int(self._most()[layer]) and self._frames.num_free > 0

    def take_back(self, sets: FrameSets, *, goes_on: bool) -> None:
        """See `MemoryManager.take_back`."""
        lent, self._lent = self._lent, None
        assert lent is not None, "nothing is lent"
        self._frames.end_lending()
        before = self._end_joined(lent, sets)
        is_place = np.arange(self._num_experts) < sets.sizes[:, np.newaxis]
        is_new = (sets.owners != before) & is_place
        is_used = (sets.keys == USED) & is_place
        self._replace(before, sets, is_new)
        num_hits = self._note_uses(sets.owners, is_used, is_hit=is_used & ~is_new)
        self._pager.note_step(hits=num_hits, misses=int(self._misses.sum()), is_followed=goes_on)
        self._prefetches.end_layers()
        if goes_on:
            self._frames.lend(int(np.count_nonzero((sets.owners == ABSENT) & is_place)))
            self._lent = sets.copy()

    def _end_joined(self, lent: FrameSets, sets: FrameSets) -> Places:
        """End the prefetches that have joined a set; who had its places before the step made anything of them."""
        layers = np.flatnonzero(sets.sizes > lent.sizes).tolist()
        if not layers:
            return lent.owners
        before = lent.owners.copy()
        load_into = {load.frame: load for load in self._table.loading.values()}
        for layer in layers:
            for place in range(int(lent.sizes[layer]), int(sets.sizes[layer])):
                load = load_into[int(sets.frames[layer, place])]
                is_there = bool(sets.owners[layer, place] == load.expert)
                self._prefetches.end_joined(load, is_there=is_there)
                if is_there:
                    before[layer, place] = load.expert
        return before

    def _make_least(self, least: int) -> bool:
        """Whether each layer can have so many frames, if prefetches give theirs up for it; then they do."""
        if self._layer_frames:
            return least <= int(self._most().min())
        missing = self._num_layers * least - self._num_frames
        if missing > self._prefetches.num_on_their_way:
            return False
        for _ in range(missing):
            self._prefetches.drop_last()
        return True

    def _make_way(self) -> None:
        """Let what is worth less than any expert give way to as many misses as there were lately."""
        num_absent = self._table.frame_table.size - self._frames.num_expert
        expected = min(int(self._misses.sum()), num_absent)
        while self._frames.num_free < expected and self._evictor.make_way():
            pass

    def _num_spare(self, least: int, num_ahead: int) -> int:
        """Frames that sets could have, for prefetches."""
        beyond_least: int = self._num_frames - self._num_layers * least
        most = ceil_div(self._num_frames, FRAMES_PER_SPARE)
        return min(max(0, num_ahead), most, beyond_least)

    def _plan_sizes(self, least: int, num_spare: int) -> Counts:
        most = self._most()
        return plan_sizes(
            np.array(self._table.num_resident),
            most if self._layer_frames else self._current_quotas(least, num_spare),
            self._misses,
            num_free=self._frames.num_free - num_spare,
            least=least,
            most=most,
        )

    def _current_quotas(self, least: int, num_spare: int) -> Counts:
        """Quotas of late, or new ones where these can't be kept."""
        quotas, num_frames = self._quotas, self._num_frames - num_spare
        self._quota_age += 1
        if (
            quotas is None
            or self._quota_age >= QUOTA_STEPS
            or int(quotas.sum()) > num_frames
            or int(quotas.min()) < least
        ):
            quotas = plan_quotas(self._order.values.demand(), num_frames, least)
            self._quotas, self._quota_age = quotas, 0
        return quotas

    @property
    def _num_frames(self) -> int:
        """That sets can have."""
        return self._frames.num_free + sum(self._table.num_resident)

    def _most(self) -> Counts:
        """The most that each set can have."""
        if not self._layer_frames:
            return np.full(self._num_layers, self._num_experts)
        return self._layer_frames - np.array(self._table.num_loading)

    def _replace(self, before: Places, sets: FrameSets, is_new: IsPlace) -> None:
        """Who has a place that was another's before, or nobody's, has its frame."""
        layers, places = np.nonzero(is_new)
        newcomers = sets.owners[layers, places].astype(np.intp)
        evicted = before[layers, places].astype(np.intp)
        self._prefetches.drop_these(zip(layers.tolist(), newcomers.tolist(), strict=True))
        self._table.replace(layers, evicted, newcomers, frames=sets.frames[layers, places])
        self._evictor.experts_evicted += int(np.count_nonzero(evicted != ABSENT))
        self._misses = np.bincount(layers, minlength=self._num_layers)

    def _note_uses(self, owners: Places, is_used: IsPlace, *, is_hit: IsPlace) -> int:
        """How many were hits."""
        layers, places = np.nonzero(is_hit)
        self._prefetches.use(layers, owners[layers, places].astype(np.intp))
        experts = owners[is_used].astype(np.intp)
        stops = np.count_nonzero(is_used, axis=1).cumsum().tolist()
        start = 0
        for layer, stop in enumerate(stops):
            self._order.use(layer, experts[start:stop])
            start = stop
        return len(layers)
