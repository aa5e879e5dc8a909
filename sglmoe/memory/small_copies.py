"""Small copies between host and device for which nobody waits."""

from typing import Any

import torch


def on_device(
    values: Any, device: torch.device | str, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """A tensor of these numbers, on its way behind what is queued. PyTorch keeps its page-locked memory until it has come."""
    host = torch.tensor(values, dtype=dtype, pin_memory=torch.device(device).type != "cpu")
    return host.to(device, non_blocking=True)


def rows_on_device(rows: list[list[int]], device: str) -> tuple[torch.Tensor, ...]:
    """The same of rows of one length, in one copy: int64, each aligned as kernels are compiled for."""
    length = len(rows[0])
    host = torch.zeros(
        (len(rows), length + length % 2), dtype=torch.int64, pin_memory=device != "cpu"
    )
    host[:, :length] = torch.tensor(rows)
    return tuple(row[:length] for row in host.to(device, non_blocking=True))


class ToHost:
    """A tensor of the device on its way to the host, from now on."""

    def __init__(self, values: torch.Tensor):
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.device.type != "cpu":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def is_there(self) -> bool:
        return self._event is None or bool(self._event.query())

    def wait(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host
