"""Records a routing trace: every call that changes memory, and the routing of every token.

While a recording runs, the worker speaks to memory through `RecordedMemory`, and the model hands
each forward pass to `Recorder.forward`. Nothing is recorded, and nothing costs, without one.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sglmoe.errors import requests
from sglmoe.memory.arena import Geometry
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.radix_cache import TOKEN_BYTES
from sglmoe.prediction.trace import (
    FORMAT_VERSION,
    Kind,
    Totals,
    Trace,
    TraceInfo,
    save_trace,
)
from sglmoe.protocol import MemorySnapshot, RecordRouting
from sglmoe.units import show_bytes
from sglmoe.worker.worker import Worker

# Probabilities of 128 experts in 48 layers are 12 KiB a token: a third of a million tokens.
MAX_BYTES = 4 * 2**30


class TracedModel(Protocol):
    """A model that hands its forward passes to the recorder, if there is one."""

    recorder: "Recorder | None"


class Recorder:
    """The growing lists that become a `Trace`."""

    def __init__(
        self, memory: MemoryManager, *, model: str, geometry: Geometry, floor_frames: int
    ) -> None:
        self._memory = memory
        self._model = model
        self._geometry = geometry
        self._floor_frames = floor_frames
        self._start = totals(memory.snapshot(0))
        self._operations: list[tuple[int, int, int, int, int]] = []
        self._numbers: dict[str, int] = {}  # rid -> request
        self._namespaces: list[str] = []
        self._tokens: list[bytes] = []
        self._columns: dict[str, list[npt.NDArray[Any]]] = {
            name: [] for name in ("token_ids", "positions", "owners", "expert_ids", "probabilities")
        }
        self._step_bounds = [0]
        self._step_seconds: list[float] = []
        self._num_bytes = 0
        self._end: Totals | None = None  # once nothing more is recorded
        self.prices(memory.prices.expert_nanoseconds, memory.prices.token_nanoseconds)

    def operation(
        self, kind: Kind, request: int = 0, amount: int = 0, limit: int = 0, result: int = 0
    ) -> None:
        if self._end is None:
            self._operations.append((kind, request, amount, limit, result))

    def prices(self, expert_nanoseconds: int, token_nanoseconds: int) -> None:
        """What things cost from now on, as far as a trace can say it: 2 seconds at most."""
        most = int(np.iinfo(np.int32).max)
        self.operation(Kind.PRICES, 0, min(expert_nanoseconds, most), min(token_nanoseconds, most))

    def close(self) -> None:
        """Record nothing from now on."""
        if self._end is None:
            self._end = totals(self._memory.snapshot(0)).since(self._start)

    def number(self, rid: str, namespace: str) -> int:
        """The request's number in the trace, given when it is first admitted."""
        if rid not in self._numbers:
            self._numbers[rid] = len(self._numbers)
            self._namespaces.append(namespace)
            self._tokens.append(b"")
        return self._numbers[rid]

    def note_tokens(self, rid: str, tokens: bytes) -> int:
        """Keep the longest run of the request's tokens that was ever shown; its number."""
        number = self._numbers[rid]
        if len(tokens) > len(self._tokens[number]):
            self._tokens[number] = tokens
        return number

    def forward(
        self,
        rids: Sequence[str],
        *,
        token_ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        owners: npt.NDArray[np.int64],
        expert_ids: npt.NDArray[np.int32],
        probabilities: npt.NDArray[np.float16],
        seconds: float,
    ) -> None:
        """One forward pass over T tokens. `owners` [T] are indices into `rids`; `expert_ids` is
        [T, layers, top_k], `probabilities` [T, layers, experts]."""
        if self._end is not None:
            return
        numbers = np.array([self._numbers[rid] for rid in rids], np.int32)
        small = np.uint8 if probabilities.shape[2] <= 256 else np.uint16
        columns = {
            "token_ids": token_ids.astype(np.int32),
            "positions": positions.astype(np.int32),
            "owners": numbers[owners],
            "expert_ids": expert_ids.astype(small),
            "probabilities": probabilities,
        }
        for name, column in columns.items():
            self._columns[name].append(column)
            self._num_bytes += column.nbytes
        start, stop = self._step_bounds[-1], self._step_bounds[-1] + len(token_ids)
        self.operation(Kind.FORWARD, len(self._step_seconds), start, stop)
        self._step_bounds.append(stop)
        self._step_seconds.append(seconds)
        if self._num_bytes > MAX_BYTES:
            self.close()

    def dump(self, directory: Path) -> tuple[bool, str]:
        """Write what has been recorded; whether there was anything, and where it is."""
        if not self._step_seconds:
            return False, str(requests.nothing_recorded())
        was_full = self._num_bytes > MAX_BYTES
        self.close()
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"expert_distribution_recorder_{time.time()}.npz"
        save_trace(self._trace(), path)
        text = f"{self._step_bounds[-1]} tokens in {len(self._step_seconds)} steps: {path}"
        if was_full:
            text += f"; recording stopped at {show_bytes(MAX_BYTES)}"
        return True, text

    def _trace(self) -> Trace:
        assert self._end is not None
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        lengths = [len(tokens) // TOKEN_BYTES for tokens in self._tokens]
        _, num_layers, top_k = columns["expert_ids"].shape
        info = TraceInfo(
            version=FORMAT_VERSION,
            model=self._model,
            num_layers=num_layers,
            num_experts=columns["probabilities"].shape[2],
            top_k=top_k,
            geometry=self._geometry,
            floor_frames=self._floor_frames,
            policy=self._memory.policy,
            expert_ratio=self._memory.expert_ratio,
            totals=self._end,
            namespaces=self._namespaces,
        )
        return Trace(
            info=info,
            operations=np.array(self._operations, np.int32),
            request_tokens=np.frombuffer(b"".join(self._tokens), np.int32),
            request_bounds=np.cumsum([0, *lengths], dtype=np.int64),
            step_bounds=np.array(self._step_bounds, np.int64),
            step_seconds=np.array(self._step_seconds, np.float32),
            **columns,
        )


class Recording:
    """At most one recording, started, stopped and written by message, between two steps."""

    def __init__(
        self,
        worker: Worker,
        model: TracedModel,
        new_recorder: Callable[[], Recorder],
        memory: MemoryManager,
        *,
        pause: Sequence[Callable[[bool], None]],
    ):
        """Each of `pause` stops and restarts something that changes memory and is not recorded."""
        self._worker = worker
        self._model = model
        self._pause = [memory.pause_streaming, *pause]
        self._new_recorder = new_recorder
        self._memory = memory
        self._recorder: Recorder | None = None

    def handle(self, message: RecordRouting) -> tuple[bool, str]:
        """Whether that was possible, and what is recorded where, or why not."""
        match message.action:
            case "start":
                return self._start()
            case "stop":
                return self._stop()
            case "dump":
                if self._recorder is None:
                    return False, str(requests.no_recording())
                self._stop()
                return self._recorder.dump(Path(message.directory))

    def _start(self) -> tuple[bool, str]:
        if self._memory.frame_table.size == 0:
            return False, str(requests.nothing_to_record())
        if not self._worker.is_idle:
            return False, str(requests.requests_running())
        self._stop()
        for pause in self._pause:
            pause(True)
        self._memory.clear()
        self._recorder = self._model.recorder = self._new_recorder()
        self._worker.memory = RecordedMemory(self._memory, self._recorder)
        return True, "recording"

    def _stop(self) -> tuple[bool, str]:
        if self._recorder is not None:
            self._recorder.close()
            for pause in self._pause:
                pause(False)
        self._model.recorder = None
        self._worker.memory = self._memory
        return True, "stopped"


class RecordedMemory:
    """A `MemoryManager` whose changes are written down."""

    def __init__(self, memory: MemoryManager, recorder: Recorder):
        self._memory = memory
        self._recorder = recorder
        self.probe = memory.probe
        self.has_pages = memory.has_pages
        self.token_id = memory.token_id
        self.token_ids = memory.token_ids
        self.begin_step = memory.begin_step  # follows from FORWARD
        self.snapshot = memory.snapshot

    def admit(
        self, rid: str, tokens: bytes, namespace: str, *, max_cached_tokens: int | None = None
    ) -> int:
        cached = self._memory.admit(rid, tokens, namespace, max_cached_tokens=max_cached_tokens)
        self._recorder.number(rid, namespace)
        number = self._recorder.note_tokens(rid, tokens)
        limit = -1 if max_cached_tokens is None else max_cached_tokens
        self._recorder.operation(Kind.ADMIT, number, len(tokens) // TOKEN_BYTES, limit, cached)
        return cached

    def extend(self, rid: str, num_tokens: int) -> bool:
        extended = self._memory.extend(rid, num_tokens)
        number = self._recorder.note_tokens(rid, b"")
        self._recorder.operation(Kind.EXTEND, number, num_tokens, 0, extended)
        return extended

    def commit(self, rid: str, tokens: bytes, num_computed: int) -> bool:
        changed = self._memory.commit(rid, tokens, num_computed)
        number = self._recorder.note_tokens(rid, tokens)
        self._recorder.operation(Kind.COMMIT, number, num_computed, 0, changed)
        return changed

    def release(self, rid: str, tokens: bytes, num_computed: int) -> None:
        self._memory.release(rid, tokens, num_computed)
        number = self._recorder.note_tokens(rid, tokens)
        self._recorder.operation(Kind.RELEASE, number, num_computed)

    def flush_cache(self) -> None:
        self._memory.flush_cache()
        self._recorder.operation(Kind.FLUSH)

    def set_prices(self, *, expert_nanoseconds: int, token_nanoseconds: int) -> None:
        self._memory.set_prices(
            expert_nanoseconds=expert_nanoseconds, token_nanoseconds=token_nanoseconds
        )
        self._recorder.prices(expert_nanoseconds, token_nanoseconds)


def totals(snapshot: MemorySnapshot) -> Totals:
    return Totals(*(getattr(snapshot, name) for name in Totals.__struct_fields__))
