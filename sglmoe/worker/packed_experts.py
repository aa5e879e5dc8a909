"""Finds the packed experts that `python -m sglmoe.pack` wrote for a checkpoint, and has the store read them."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sglmoe.errors.options import nothing_packed
from sglmoe.memory.decode_ratio import DecodeRatio
from sglmoe.memory.device_decode import staged_bytes
from sglmoe.memory.mapped_files import Extent
from sglmoe.memory.packed_extent import PackedPlace, load_decoder
from sglmoe.memory.packed_order import NO_PACKING, Packing
from sglmoe.memory.packed_share import plan_slab_class
from sglmoe.memory.store import ExpertStore
from sglmoe.packed_checkpoint import PackedLayer, find_layers
from sglmoe.units import show_bytes

logger = logging.getLogger(__name__)


def use_packed(store: ExpertStore, wanted: str, model_path: str) -> None:
    """Have `store`, which is unmapped, read packed what there is packed of it. `wanted`: `EngineConfig.packed_experts`.

    Raises ValueError, saying what to do, where they are wanted and can't be used.
    """
    shards = store.paths()
    layers, unused = find_layers(wanted, model_path, map(Path, shards))
    for why in unused:
        logger.warning("packed experts are not used: %s", why)
    if not layers:
        return
    load_decoder()  # now, rather than in the first request
    store.use_packed(places(layers, shards))
    logger.info(
        "packed experts of %d layers in %s: all experts take %s instead of %s",
        len(layers),
        layers[0].path.parent,
        show_bytes(store.stored_total_bytes()),
        show_bytes(store.total_bytes),
    )


def plan_packing(
    store: ExpertStore,
    share: float | None,
    ratio: DecodeRatio,
    *,
    frame_bytes: int,
    time_decoding: Callable[[], float] | None,
) -> Packing:
    """What memory needs to know to hold packed experts in frames. `share`: `EngineConfig.packed_share`. `time_decoding` says
    what decoding an expert takes; None: nothing can be decoded into frames.

    Raises ValueError, saying what to do, where a share is asked for and packed experts are no smaller than a frame.
    """
    if share == 0.0:
        return NO_PACKING
    packed_bytes = staged_bytes(store)
    why = ""
    if not packed_bytes or plan_slab_class(packed_bytes, frame_bytes) is None:
        why = f"the largest expert takes {packed_bytes} bytes as it is read, a frame {frame_bytes}"
    elif time_decoding is None:
        why = f"tensors or frames, of {frame_bytes} bytes, begin where a GPU does not decode to"
    if why or time_decoding is None:
        if share is not None:
            raise nothing_packed(given=f"{share:.0%}", why=why)
        logger.info("no packed experts in the arena: %s", why)
        return NO_PACKING
    ratio.note(time_decoding(), is_decoded=True)
    return Packing(packed_bytes, ratio, share)


def decoding_seconds(store: ExpertStore) -> float:
    """What decoding an expert takes from memory, on a CPU: the least of three times."""
    layer, expert = store.experts()[0]
    stored = np.empty(store.stored_expert_bytes(), np.uint8)
    target = np.empty(store.expert_bytes(), np.uint8)
    store.read_stored(layer, expert, stored)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        store.unpack(layer, expert, [stored], target)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def places(layers: list[PackedLayer], shards: set[str]) -> dict[tuple[str, int], PackedPlace]:
    """By where tensors lie in the checkpoint: where they lie packed. Opens the packed files; they stay open."""
    path_of = {Path(shard).name: shard for shard in shards}
    found = {}
    for layer in layers:
        descriptor = os.open(layer.path, os.O_RDONLY | os.O_CLOEXEC)
        for tensor in layer.index.tensors:
            packed = Extent(descriptor, tensor.packed_offset, tensor.packed_bytes, str(layer.path))
            place = PackedPlace(packed, tensor.checksum, tensor.num_bytes)
            found[path_of[tensor.shard], tensor.shard_offset] = place
    return found
