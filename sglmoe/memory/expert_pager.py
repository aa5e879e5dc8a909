"""Brings the experts of a layer in, wave by wave."""

import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from sglmoe.memory.arena import Frames
from sglmoe.memory.expert_order import ExpertOrder
from sglmoe.memory.experts import ABSENT, NO_EXPERTS, ExpertIds, ExpertTable, Load
from sglmoe.memory.layer_streaming import LayerStreaming
from sglmoe.memory.link_gate import Finish, LoadExperts
from sglmoe.memory.packed_slabs import PackedSlabs
from sglmoe.memory.prefetches import Prefetches
from sglmoe.memory.prices import Prices

T = TypeVar("T")


class ExpertPager:
    """Pins what a wave needs and loads what of it is absent.

    `make_frame(layer)` frees a frame for an expert of that layer, or says that it can't. With
    `stream_prices` see `LayerStreaming`.
    """

    def __init__(
        self,
        table: ExpertTable,
        order: ExpertOrder,
        *,
        frames: Frames,
        slabs: PackedSlabs,
        prefetches: Prefetches,
        make_frame: Callable[[int], bool],
        load_experts: LoadExperts,
        stream_prices: Prices | None = None,
    ):
        self._table = table
        self._order = order
        self._frames = frames
        self._slabs = slabs
        self._prefetches = prefetches
        self._make_frame = make_frame
        self._load_experts = load_experts
        self.streaming: LayerStreaming | None = None
        if stream_prices is not None:
            self.streaming = LayerStreaming(
                table,
                order,
                prefetches=prefetches,
                prices=stream_prices,
                stalled=lambda: self.stall_seconds,
            )
        self._num_experts = table.frame_table.shape[1]
        self._loads: list[Load] = []  # demand loads under way
        self._late: list[Load] = []  # prefetches under way that the layer needs now
        self._finish: Finish | None = None  # what ends them
        self.hits = 0  # totals since the start: these and the following
        self.misses = 0
        self.num_waves = 0
        self.num_split_layers = 0
        self.lent_steps = 0
        self.followed_steps = 0
        self.stall_seconds = 0.0
        self.late_seconds = 0.0  # of these, for prefetches that came late
        self.load_seconds = 0.0  # that demand loads took, whether anybody waited or not

    def waves(self, layer: int, experts: ExpertIds) -> Generator[ExpertIds, None, None]:
        """See `MemoryManager.waves`."""
        assert not self._frames.are_lent
        self.settle()
        self._prefetches.begin_layer(layer)
        self._order.use(layer, experts)
        if self.streaming is not None:
            self.streaming.layer_begins(layer, experts)
        waiting = experts
        num_rounds = 0
        while len(waiting):
            ready, coming, waiting = self._begin_round(layer, waiting)
            num_rounds += 1
            self.num_waves += 1
            self.num_split_layers += num_rounds == 2
            if self.streaming is not None and not len(waiting):
                self.streaming.loads_begun(layer)
            if len(ready):
                yield from self._lend(ready)
            if len(coming):
                failed = self._end_loads()
                came = coming[~np.isin(coming, failed)]
                waiting = np.concatenate([failed, waiting])
                self._table.pin(layer, came)
                if len(came):
                    yield from self._lend(came)
            self.settle()

    def begin_step(self, num_tokens: int) -> None:
        """See `MemoryManager.begin_step`."""
        self.settle()
        if self.streaming is not None:
            self.streaming.begin_step(num_tokens)

    def note_step(self, *, hits: int, misses: int, is_followed: bool) -> None:
        """Count those of a step without the host, which asks for no waves."""
        self.hits += hits
        self.misses += misses
        self.lent_steps += 1
        self.followed_steps += is_followed

    def counters(self) -> dict[str, Any]:
        """These totals, as `MemorySnapshot` calls them."""
        return {
            "expert_hits": self.hits,
            "expert_misses": self.misses,
            "stall_seconds": self.stall_seconds,
            "late_seconds": self.late_seconds,
            "load_seconds": self.load_seconds,
            "num_waves": self.num_waves,
            "num_split_layers": self.num_split_layers,
            "lent_steps": self.lent_steps,
            "followed_steps": self.followed_steps,
            "experts_streamed": self.streaming.num_streamed if self.streaming else 0,
        }

    def settle(self) -> None:
        """Take pins away, and end the loads of a layer that was left in the middle."""
        if self._loads or self._late:
            with suppress(OSError):  # nobody waits for them any more
                self._end_loads()
        self._table.unpin()
        self._order.layer_done()

    def _lend(self, wave: ExpertIds) -> Generator[ExpertIds, None, None]:
        """Yield a pinned wave. If the caller leaves here, settle, unless another layer has begun."""
        pinned = self._table.pinned
        is_done = False
        try:
            yield wave
            is_done = True
        finally:
            if not is_done and self._table.pinned is pinned:
                self.settle()

    def _begin_round(
        self, layer: int, waiting: ExpertIds
    ) -> tuple[ExpertIds, ExpertIds, ExpertIds]:
        """Pin what is there and begin to load others, as many as fit: those that are there, those
        that are coming, and those that must wait for another round."""
        ready, missing = self._split(layer, waiting)
        self._table.pin(layer, ready)
        self._prefetches.use(layer, ready)
        self.hits += len(ready)
        if not len(missing):
            return ready, missing, missing
        late, absent = self._promote(layer, missing)
        num_begun = self._begin_loads(layer, absent) if len(absent) else 0
        begun, waiting = absent[:num_begun], absent[num_begun:]
        assert len(ready) or len(late) or num_begun, (
            "not one expert of a layer fits: floor_frames was broken"
        )
        if not self._loads:  # they are there already
            ready, begun = np.concatenate([ready, begun]), NO_EXPERTS
            self._table.pin(layer, ready)
        return ready, np.concatenate([late, begun]), waiting

    def _split(self, layer: int, experts: ExpertIds) -> tuple[ExpertIds, ExpertIds]:
        """The residents among them, and those that are missing."""
        if self._table.num_resident[layer] == self._num_experts:
            return experts, NO_EXPERTS
        is_resident = self._table.frame_table[layer][experts] != ABSENT
        if is_resident.all():
            return experts, NO_EXPERTS
        return experts[is_resident], experts[~is_resident]

    def _promote(self, layer: int, missing: ExpertIds) -> tuple[ExpertIds, ExpertIds]:
        """Those of the missing that a prefetch brings, from now on before others; and the rest."""
        self._late = self._prefetches.promote(layer, missing)
        if not self._late:
            return NO_EXPERTS, missing
        self._table.num_awaited = len(self._late)
        late = np.array([load.expert for load in self._late], np.intp)
        return late, missing[~np.isin(missing, late)]

    def _begin_loads(self, layer: int, missing: ExpertIds) -> int:
        """Begin to bring in as many of the missing as fit, the first of them; how many."""
        for expert in missing.tolist():
            if not self._make_frame(layer):
                break
            frame = self._frames.take_for_expert(layer, expert)
            load = Load(frame, layer, expert, self._slabs.begin(layer, expert))
            self._table.begin(load)
            self._loads.append(load)
        num_begun = len(self._loads)
        self._table.num_awaited += num_begun
        if num_begun:
            started = time.perf_counter()
            self._finish = self._try(lambda: self._load_experts(self._loads))
            if self._finish is None:
                self._place(time.perf_counter() - started)
        return num_begun

    def _end_loads(self) -> ExpertIds:
        """Wait until all that were begun have ended; the experts of prefetches that have failed."""
        finish, self._finish = self._finish, None
        if finish is not None:
            self._place(self._try(finish))
        return self._end_late()

    def _end_late(self) -> ExpertIds:
        started = time.perf_counter()
        failed = [load.expert for load in self._late if not self._prefetches.wait(load)]
        seconds = time.perf_counter() - started
        self.stall_seconds += seconds
        self.late_seconds += seconds
        self.misses += len(self._late) - len(failed)
        self._table.num_awaited -= len(self._late)
        self._late = []
        return np.array(failed, np.intp)

    def _try(self, work: Callable[[], T]) -> T:
        """Begin or end the loads. If that fails, they have never been."""
        started = time.perf_counter()
        try:
            result = work()
        except BaseException:
            self._forget_loads(is_there=False)
            self._end_late()
            self._table.unpin()
            raise
        self.stall_seconds += time.perf_counter() - started
        return result

    def _place(self, seconds: float) -> None:
        self.misses += len(self._loads)
        self.load_seconds += seconds
        self._forget_loads(is_there=True)

    def _forget_loads(self, *, is_there: bool) -> None:
        for load in self._loads:
            self._slabs.end(load.layer, load.expert, is_there=is_there)
            self._table.end(load, is_there=is_there, is_used=is_there)
        self._table.num_awaited -= len(self._loads)
        self._loads = []
