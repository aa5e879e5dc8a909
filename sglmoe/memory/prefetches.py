"""Experts that are brought in before their layer asks for them."""

from collections.abc import Callable, Iterable

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.memory.arena import Frames
from sglmoe.memory.expert_order import ExpertOrder
from sglmoe.memory.experts import ABSENT, ExpertIds, ExpertTable, Load
from sglmoe.memory.prefetch import BackgroundLoader, Wanted


class PrefetchCounters(msgspec.Struct):
    """Totals since the start. Once none is on its way, begun = landed + dropped."""

    begun: int = 0
    landed: int = 0  # among them those that their layer had to wait for
    used: int = 0  # without a wait
    late: int = 0
    dropped: int = 0  # or failed


class Prefetches:
    """Begins them where they are worth it, and ends each: landed, waited for by its layer, or dropped.

    `make_frame(layer, value)` frees a frame for an expert of that layer and value, or says that
    nothing there is worth less. `is_packed`, `[num_layers, num_experts]`: these are decoded when they are
    needed, from the arena, which is not worth doing on a guess. Without `background` nothing is ever begun.
    """

    def __init__(
        self,
        background: BackgroundLoader | None,
        *,
        table: ExpertTable,
        order: ExpertOrder,
        frames: Frames,
        make_frame: Callable[[int, float], bool],
        is_packed: npt.NDArray[np.bool_],
    ):
        self._background = background
        self._table = table
        self._order = order
        self._frames = frames
        self._make_frame = make_frame
        self._is_packed = is_packed
        self._num_layers = len(table.num_resident)
        self._step = 0
        self._position = -1  # layers that have begun since the start, of all steps
        self._due: dict[
            tuple[int, int], int
        ] = {}  # on its way, and may be dropped -> the position that it is for
        self.counters = PrefetchCounters()

    @property
    def num_on_their_way(self) -> int:
        return len(self._due)

    def begin_step(self) -> None:
        self._step += 1
        self._position = self._step * self._num_layers - 1

    def begin_layer(self, layer: int) -> None:
        """Land what has arrived, and drop what was for a layer that has passed."""
        self._position = self._step * self._num_layers + layer
        self._pass(self._position)

    def end_layers(self) -> None:
        """The same when all layers of the step have passed."""
        self._position = (self._step + 1) * self._num_layers - 1
        self._pass(self._position + 1)

    def begin(self, wanted: Iterable[Wanted], limit: int) -> int:
        """Begin at most so many that are absent and worth more than what gives way, in this order."""
        if self._background is None:
            return 0
        table, values = self._table, self._order.now()
        num_begun = 0
        for layer, expert in ((its.layer, its.expert) for its in wanted):
            if num_begun == limit:
                break
            if table.frame_table[layer, expert] != ABSENT or (layer, expert) in table.loading:
                continue
            if self._is_packed[layer, expert]:
                continue
            if not self._make_frame(layer, float(values[layer, expert])):
                continue
            load = Load(self._frames.take_for_expert(layer, expert), layer, expert)
            table.begin(load)
            self._due[layer, expert] = self._next_position(layer)
            self._background.begin(load)
            num_begun += 1
        self.counters.begun += num_begun
        return num_begun

    def land(self) -> None:
        """Make residents of those that have arrived."""
        if self._background is not None and self._due:
            for arrival in self._background.finished():
                del self._due[arrival.load.layer, arrival.load.expert]
                self._end(arrival.load, is_there=arrival.is_there)

    def promote(self, layer: int, experts: ExpertIds) -> list[Load]:
        """Those of a layer's experts that are on their way: it needs them now. Each is to be waited for."""
        if not self._table.num_loading[layer]:
            return []
        assert self._background is not None
        loading = self._table.loading
        late = [loading[layer, e] for e in experts.tolist() if (layer, e) in loading]
        for load in late:
            del self._due[load.layer, load.expert]
            self._background.promote(load)
        return late

    def wait(self, load: Load) -> bool:
        """Until one that was promoted has ended; whether it is there."""
        assert self._background is not None
        is_there = self._background.wait(load)
        self._end(load, is_there=is_there, is_used=True)
        self.counters.late += is_there
        return is_there

    def end_joined(self, load: Load, *, is_there: bool) -> None:
        """A step without the host has found it in its frame; the expert is a resident, or has lost the frame again."""
        assert self._background is not None
        del self._due[load.layer, load.expert]
        self._background.promote(load)
        came = self._background.wait(load)
        assert came, f"{load} was told to a step, and has failed"
        self._end(load, is_there=is_there)

    def use(self, layer: int | ExpertIds, residents: ExpertIds) -> None:
        """The layer has found these; or each its own layer."""
        if self.counters.landed:
            self.counters.used += self._table.use(layer, residents)

    def drop_last(self) -> bool:
        """Drop the one that was begun last, for whoever needs its frame; False if there is none."""
        if not self._due:
            return False
        self.drop(next(reversed(self._due)))
        return True

    def drop(self, key: tuple[int, int]) -> None:
        """Give up one on its way: `(layer, expert)`."""
        assert self._background is not None
        load = self._table.loading[key]
        del self._due[key]
        self._background.cancel(load)
        self._end(load, is_there=False)

    def drop_these(self, keys: Iterable[tuple[int, int]]) -> None:
        """Give up those of them that are on their way."""
        if self._due:
            for key in self._due.keys() & set(keys):
                self.drop(key)

    def drop_all(self) -> None:
        """Give up all that are on their way."""
        while self.drop_last():
            pass

    def _pass(self, position: int) -> None:
        if not self._due:
            return
        self.land()
        for key in [key for key, due in self._due.items() if due < position]:
            self.drop(key)

    def _end(self, load: Load, *, is_there: bool, is_used: bool = False) -> None:
        self._table.end(load, is_there=is_there, is_used=is_used)
        self.counters.landed += is_there
        self.counters.dropped += not is_there

    def _next_position(self, layer: int) -> int:
        """When the layer comes next."""
        return self._position + 1 + (layer - self._position - 1) % self._num_layers
