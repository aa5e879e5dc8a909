"""Brings the experts of a layer in, wave by wave."""

import time
from collections.abc import Callable, Generator, Sequence

import numpy as np

from sglmoe.memory.arena import Frames
from sglmoe.memory.expert_order import ExpertOrder
from sglmoe.memory.experts import ABSENT, NO_EXPERTS, ExpertIds, ExpertTable, Load

LoadExperts = Callable[[Sequence[Load]], None]


class ExpertPager:
    """Pins what a wave needs and loads what of it is absent.

    `make_frame(layer, num_loading)` frees a frame for an expert of that layer, of which `num_loading`
    have got one already and aren't in the table yet; or says that it can't.
    `load_experts` returns when the experts' bytes are in their frames.
    """

    def __init__(
        self,
        table: ExpertTable,
        order: ExpertOrder,
        *,
        frames: Frames,
        make_frame: Callable[[int, int], bool],
        load_experts: LoadExperts,
    ):
        self._table = table
        self._order = order
        self._frames = frames
        self._make_frame = make_frame
        self._load_experts = load_experts
        self._num_experts = table.frame_table.shape[1]
        self.hits = 0  # totals since the start: these and the following
        self.misses = 0
        self.num_waves = 0
        self.num_split_layers = 0
        self.stall_seconds = 0.0

    def waves(self, layer: int, experts: ExpertIds) -> Generator[ExpertIds, None, None]:
        """See `MemoryManager.waves`."""
        self._table.unpin()
        self._order.use(layer, experts)
        waiting = experts
        num_waves = 0
        while len(waiting):
            wave, waiting = self._begin_wave(layer, waiting)
            num_waves += 1
            self.num_waves += 1
            self.num_split_layers += num_waves == 2
            try:
                yield wave
            finally:
                if self._table.pinned is wave:  # else another layer has begun meanwhile
                    self._table.unpin()
                    self._order.layer_done()

    def _begin_wave(self, layer: int, waiting: ExpertIds) -> tuple[ExpertIds, ExpertIds]:
        """Pin residents and load others, as many as fit: (this wave, those that must wait)."""
        residents, missing = self._split(layer, waiting)
        self._table.pin(layer, residents)
        self.hits += len(residents)
        if not len(missing):
            return residents, missing
        num_loaded = self._load(layer, missing)
        wave = np.concatenate([residents, missing[:num_loaded]])
        assert len(wave), "not one expert of a layer fits: floor_frames was broken"
        self._table.pin(layer, wave)
        return wave, missing[num_loaded:]

    def _split(self, layer: int, experts: ExpertIds) -> tuple[ExpertIds, ExpertIds]:
        """The residents among them, and those that are missing."""
        if self._table.num_resident[layer] == self._num_experts:
            return experts, NO_EXPERTS
        is_resident = self._table.frame_table[layer][experts] != ABSENT
        if is_resident.all():
            return experts, NO_EXPERTS
        return experts[is_resident], experts[~is_resident]

    def _load(self, layer: int, missing: ExpertIds) -> int:
        """Bring in and place as many of the missing as fit, the first of them; how many."""
        loads: list[Load] = []
        for expert in missing.tolist():
            if not self._make_frame(layer, len(loads)):
                break
            loads.append(Load(self._frames.take_for_expert(layer, expert), layer, expert))
        if loads:
            self._run_loads(loads)
        for load in loads:
            self._table.place(load)
        return len(loads)

    def _run_loads(self, loads: list[Load]) -> None:
        started = time.perf_counter()
        try:
            self._load_experts(loads)
        except BaseException:
            self._table.unpin()
            for load in loads:
                self._frames.give(load.frame)
            raise
        self.stall_seconds += time.perf_counter() - started
        self.misses += len(loads)
