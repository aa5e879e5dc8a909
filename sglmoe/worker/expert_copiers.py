"""What brings experts into frames, on this device: the copiers that memory is given."""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from sglmoe.memory.arena import Geometry
from sglmoe.memory.background_copier import Copy, Mark
from sglmoe.memory.decode_ratio import DecodeRatio
from sglmoe.memory.device_decode import DecodedFrames
from sglmoe.memory.device_transfer import DeviceCopier, StreamCopier
from sglmoe.memory.host_tier import HostTier, TieredStore
from sglmoe.memory.link_gate import LoadExperts
from sglmoe.memory.load_timer import LoadTimer, device_decoding_seconds
from sglmoe.memory.store import ExpertStore
from sglmoe.memory.transfer import HostCopier
from sglmoe.worker.packed_experts import decoding_seconds


class Copiers(NamedTuple):
    """What copies experts into frames, for layers that wait and for those ahead."""

    load: LoadExperts
    ahead: Copy
    mark: Callable[[], Mark]  # see `BackgroundCopier`
    decode_ratio: DecodeRatio  # measured by `load`
    # What decoding an expert takes, while frames have no tenants; None: nothing can be decoded into them.
    time_decoding: Callable[[], float] | None


def expert_copiers(
    frames: torch.Tensor, geometry: Geometry, store: ExpertStore, tier: HostTier, *, packs: bool
) -> Copiers:
    """Those of this device. `packs`: whether some may be decoded from the arena."""
    if frames.device.type == "cpu":
        copier = HostCopier(
            frames.numpy(),
            frame_bytes=geometry.frame_bytes,
            store=TieredStore(tier, store),
            num_threads=os.cpu_count() or 1,
        )
        return Copiers(
            copier.load,
            copier.copy_in_background,
            lambda: None,
            copier.decode_ratio,
            lambda: decoding_seconds(store),
        )
    where = {"arena": frames, "frame_bytes": geometry.frame_bytes, "store": store, "tier": tier}
    rows = frames.view(-1, geometry.frame_bytes)
    ratio = DecodeRatio()
    if not tier.as_stored:
        demand, ahead = DeviceCopier(**where), StreamCopier(**where)
        return Copiers(demand.load, ahead.copy, ahead.mark, ratio, None)
    into = DecodedFrames(rows, store)
    demand = DeviceCopier(**where, into=into, timer=LoadTimer(ratio) if packs else None)
    ahead = StreamCopier(**where, new_into=lambda: DecodedFrames(rows, store, num_staged=1))
    return Copiers(
        demand.load, ahead.copy, ahead.mark, ratio, lambda: device_decoding_seconds(into, store)
    )
