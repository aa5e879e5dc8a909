"""Routing traces: what a server was asked, which experts every token took, and what memory was told.

A trace begins with an empty memory, so that replaying its operations on a `MemoryManager` of the
same geometry gives the counters of the server that recorded it. Embeddings are not in it: they
follow from the token ids and the model.
"""

import json
import zipfile
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.config import MemoryPolicy
from sglmoe.errors import predictors
from sglmoe.memory.arena import Geometry

FORMAT_VERSION = 2


class Kind(IntEnum):
    """What memory was told. The columns of `Trace.operations` that follow the kind:"""

    ADMIT = 0  # request, num_tokens, max_cached_tokens (-1: none), cached tokens
    EXTEND = 1  # request, num_tokens, 0, whether there was room
    COMMIT = 2  # request, num_computed, 0, whether pages changed
    RELEASE = 3  # request, num_computed, 0, 0
    FLUSH = 4  # 0, 0, 0, 0
    FORWARD = 5  # step, first token, stop token, 0
    PRICES = 6  # 0, nanoseconds to load an expert, to prefill a token, 0


class Totals(msgspec.Struct, frozen=True):
    """How often what happened; of one run or of the same run replayed."""

    expert_hits: int
    expert_misses: int
    experts_evicted: int
    pages_evicted: int
    num_waves: int
    num_split_layers: int
    cache_hit_tokens: int

    def since(self, start: "Totals") -> "Totals":
        return Totals(*(getattr(self, f) - getattr(start, f) for f in self.__struct_fields__))


class TraceInfo(msgspec.Struct, frozen=True):
    """What a trace says of itself."""

    version: int
    model: str
    num_layers: int  # that have experts
    num_experts: int
    top_k: int
    geometry: Geometry
    floor_frames: int
    policy: MemoryPolicy
    expert_ratio: float  # that MemoryPolicy.STATIC gives to experts
    totals: Totals
    namespaces: list[str]  # of each request


class Trace(msgspec.Struct, frozen=True, eq=False):
    """T tokens in S steps of R requests. A request's tokens may be computed more than once."""

    info: TraceInfo
    operations: npt.NDArray[np.int32]  # [operations, 5], see `Kind`
    request_tokens: npt.NDArray[np.int32]  # of all requests, one after the other
    request_bounds: npt.NDArray[np.int64]  # [R + 1]
    token_ids: npt.NDArray[np.int32]  # [T]
    positions: npt.NDArray[np.int32]  # [T]
    owners: npt.NDArray[np.int32]  # [T], the request
    expert_ids: npt.NDArray[Any]  # [T, layers, top_k], uint8 or uint16
    probabilities: npt.NDArray[np.float16]  # [T, layers, experts], softmax over all experts
    step_bounds: npt.NDArray[np.int64]  # [S + 1]
    step_seconds: npt.NDArray[np.float32]  # [S], the forward pass

    @property
    def num_steps(self) -> int:
        return len(self.step_bounds) - 1

    def tokens_of(self, request: int) -> npt.NDArray[np.int32]:
        """A request's prompt and what it generated."""
        start, stop = self.request_bounds[request : request + 2]
        return self.request_tokens[start:stop]

    def experts_by_layer(self) -> list[list[list[int]]]:
        """Step, layer -> the experts that any token of the step takes there, in ascending order."""
        steps = np.repeat(np.arange(self.num_steps), np.diff(self.step_bounds))
        used = np.zeros((self.num_steps, self.info.num_layers, self.info.num_experts), bool)
        layers = np.arange(self.info.num_layers)[None, :, None]
        used[steps[:, None, None], layers, self.expert_ids] = True
        flat = np.nonzero(used.reshape(-1, self.info.num_experts))
        bounds = np.searchsorted(flat[0], np.arange(self.num_steps * self.info.num_layers + 1))
        experts = flat[1].tolist()
        rows = [experts[a:b] for a, b in pairwise(bounds.tolist())]
        num_layers = self.info.num_layers
        return [rows[i : i + num_layers] for i in range(0, len(rows), num_layers)]


def save_trace(trace: Trace, path: Path) -> None:
    """Write the file whole or not at all."""
    arrays = {name: getattr(trace, name) for name in ARRAYS}
    # The low bytes and then the high ones: a file 6 % smaller.
    halves = np.ascontiguousarray(arrays.pop("probabilities")).view(np.uint8)
    arrays[PROBABILITY_BYTES] = np.stack([halves[..., 0::2], halves[..., 1::2]])
    arrays["info"] = np.frombuffer(msgspec.json.encode(trace.info), np.uint8)
    unfinished = path.with_suffix(".unfinished")
    # As `np.savez_compressed`, but a tenth smaller; `np.load` reads it.
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)  # type: ignore[no-untyped-call]
    unfinished.replace(path)


def load_trace(path: Path) -> Trace:
    """Raises ValueError for a file that is no trace or of another version."""
    # Opened here, as numpy does not close one that is no archive.
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        if "info" not in file:
            raise predictors.no_trace(path=path)
        text = file["info"].tobytes()
        version = json.loads(text)["version"]
        if version != FORMAT_VERSION:
            raise predictors.trace_of_version(path=path, version=version, expected=FORMAT_VERSION)
        info = msgspec.json.decode(text, type=TraceInfo)
        arrays = {name: file[name] for name in ARRAYS if name in file}
        if PROBABILITY_BYTES in file:  # not in older ones
            halves = np.stack(file[PROBABILITY_BYTES], axis=-1)
            arrays["probabilities"] = halves.view(np.float16)[..., 0]
        return Trace(info, **arrays)


PROBABILITY_BYTES = "probability_bytes"  # uint8 [2, *], of `probabilities`, little-endian
ARRAYS = tuple(name for name in Trace.__struct_fields__ if name != "info")
