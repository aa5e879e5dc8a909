"""What host and device tell each other of a step that runs without the host, in one copy each way."""

from itertools import accumulate
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglmoe.kernels.residency import DeviceResidency
from sglmoe.memory.frame_sets import USED, FrameSets


class Sizes(NamedTuple):
    """Of the model, and of the largest captured step."""

    num_layers: int  # with experts
    num_experts: int
    top_k: int
    max_rows: int


class StepState:
    """Uploaded as a whole before a step; behind it, the last parts are read back. int32."""

    def __init__(self, its: Sizes, device: str):
        of_experts = (its.num_layers, its.num_experts)
        shapes = {
            "number": (1,),
            "num_rows": (1,),
            "frame_table": of_experts,
            "set_sizes": of_experts[:1],
            "set_frames": of_experts,
            "set_owners": of_experts,
            "set_keys": of_experts,
            "shortfall": (1,),
        }
        stops = dict(zip(shapes, accumulate(map(prod, shapes.values())), strict=True))
        is_pinned = device != "cpu"
        self._sent = torch.zeros(stops["shortfall"], dtype=torch.int32, pin_memory=is_pinned)
        self._came = torch.zeros_like(self._sent, pin_memory=is_pinned)
        self._device = torch.zeros_like(self._sent, device=device)
        self._back = slice(stops["frame_table"], None)

        def parts(flat: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                name: flat[stops[name] - prod(shape) : stops[name]].view(shape)
                for name, shape in shapes.items()
            }

        self._host = {name: its.numpy() for name, its in parts(self._sent).items()}
        self._read = {name: its.numpy() for name, its in parts(self._came).items()}
        on_device = parts(self._device)
        self.number = on_device.pop("number")
        self.num_rows = on_device.pop("num_rows")
        self.residency = DeviceResidency(
            **on_device,
            block_of=torch.full(of_experts, -1, dtype=torch.int32, device=device),
            used_key=torch.full((1,), USED, dtype=torch.int32, device=device),
        )
        self._event = torch.cuda.Event() if is_pinned else None

    def upload(
        self, number: int, sets: FrameSets, frame_table: npt.NDArray[np.int32], num_rows: int
    ) -> None:
        """Queue it, in front of the step. What was read back before is over, so the host's buffer is free."""
        values = {
            "number": number,
            "num_rows": num_rows,
            "frame_table": frame_table,
            "set_sizes": sets.sizes,
            "set_frames": sets.frames,
            "set_owners": sets.owners,
            "set_keys": sets.keys,
            "shortfall": 0,
        }
        for name, value in values.items():
            self._host[name][...] = value
        self._device.copy_(self._sent, non_blocking=True)

    def queue_back(self) -> None:
        """Copy back, as soon as the step is over."""
        self._came[self._back].copy_(self._device[self._back], non_blocking=True)
        if self._event is not None:
            self._event.record()

    @property
    def is_back(self) -> bool:
        """Whether that has been done."""
        return self._event is None or bool(self._event.query())

    def read_back(self) -> FrameSets:
        """What became of the sets, once it has come. Not to be kept."""
        if self._event is not None:
            self._event.synchronize()
        its = self._read
        shortfall = int(its["shortfall"][0])
        assert not shortfall, f"{shortfall} experts found no frame in a captured step"
        return FrameSets(its["set_sizes"], its["set_frames"], its["set_owners"], its["set_keys"])
