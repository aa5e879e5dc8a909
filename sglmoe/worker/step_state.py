"""What host and device tell each other of a step that runs without the host, in one copy each way.

Where a step goes on with the sets of the one before it, of which the host may not have heard, it is told the first few words.
"""

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


IN_FLIGHT = 2  # steps at most that were queued, and have not been read back


class StepState:
    """Uploaded as a whole before a step, or its head alone; behind it, all but the head is read back. int32."""

    def __init__(self, its: Sizes, device: str):
        of_experts = (its.num_layers, its.num_experts)
        head = {"number": (1,), "num_rows": (1,)}
        sets = {
            "expert_keys": of_experts,
            "frame_table": of_experts,
            "set_sizes": of_experts[:1],
            "set_frames": of_experts,
            "set_owners": of_experts,
            "set_keys": of_experts,
            "shortfall": (1,),
        }
        shapes = head | sets
        stops = dict(zip(shapes, accumulate(map(prod, shapes.values())), strict=True))
        is_pinned = device != "cpu"

        def on_host(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, pin_memory=is_pinned)

        size, self._head = stops["shortfall"], slice(len(head))
        self._back = slice(stops["frame_table"], None)
        self._sent = on_host(size)
        self._heads = [on_host(len(head)) for _ in range(IN_FLIGHT)]
        self._came = [on_host(size) for _ in range(IN_FLIGHT)]
        self._events = [torch.cuda.Event() for _ in range(IN_FLIGHT)] if is_pinned else []
        self._device = torch.zeros(size, dtype=torch.int32, device=device)

        def parts(flat: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                name: flat[stops[name] - prod(shape) : stops[name]].view(shape)
                for name, shape in shapes.items()
            }

        self._host = {name: its.numpy() for name, its in parts(self._sent).items()}
        self._read = [
            {name: its.numpy() for name, its in parts(came).items()} for came in self._came
        ]
        on_device = parts(self._device)
        self.number = on_device.pop("number")
        self.num_rows = on_device.pop("num_rows")
        self._expert_keys = on_device.pop("expert_keys")
        self.residency = DeviceResidency(
            **on_device,
            block_of=torch.full(of_experts, -1, dtype=torch.int32, device=device),
            used_key=torch.full((1,), USED, dtype=torch.int32, device=device),
        )

    def upload(
        self, number: int, sets: FrameSets, frame_table: npt.NDArray[np.int32], num_rows: int
    ) -> None:
        """Queue it, in front of the step. All that were queued before have been read back."""
        values = {
            "number": number,
            "num_rows": num_rows,
            "expert_keys": sets.expert_keys,
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

    def go_on(self, number: int, num_rows: int) -> None:
        """Queue it, in front of a step that finds the sets as the one before leaves them; but what that has used has the keys
        of all others again, as of when sets were laid out."""
        head = self._heads[number % IN_FLIGHT]
        head.numpy()[:] = number, num_rows
        self._device[self._head].copy_(head, non_blocking=True)
        its = self.residency
        keys = self._expert_keys.gather(1, its.set_owners.clamp(min=0).long())
        its.set_keys.copy_(torch.where(its.set_keys == its.used_key, keys, its.set_keys))

    def queue_back(self, number: int) -> None:
        """Copy back, as soon as the step of that number is over."""
        place = number % IN_FLIGHT
        self._came[place][self._back].copy_(self._device[self._back], non_blocking=True)
        if self._events:
            self._events[place].record()

    def is_back(self, number: int) -> bool:
        """Whether that has been done."""
        return not self._events or bool(self._events[number % IN_FLIGHT].query())

    def read_back(self, number: int) -> FrameSets:
        """What became of the sets, once it has come. Not to be kept."""
        place = number % IN_FLIGHT
        if self._events:
            self._events[place].synchronize()
        its = self._read[place]
        shortfall = int(its["shortfall"][0])
        assert not shortfall, f"{shortfall} experts found no frame in a captured step"
        return FrameSets(its["set_sizes"], its["set_frames"], its["set_owners"], its["set_keys"])
