"""What a decode step costs, from the speeds of a machine: assumed here, measured in `measure.py`."""

import msgspec

from sglmoe.memory.residency import StepModel
from sglmoe.plan.model_shape import ModelShape

# Assumed for a machine that is not here, where flags say nothing else. PCIe 4.0 x16 in practice; the disk an NVMe's.
LINK_BYTES_PER_SECOND = 25e9
DISK_BYTES_PER_SECOND = 2e9
# A current GPU's memory (RTX 4090: 1,008 GB/s), and what an eager layer takes whatever it computes: some thirty
# launches and one look of the host at its routing. Neither was measured: no GPU has run sglmoe.
GPU_BYTES_PER_SECOND = 1e12
GPU_LAYER_SECONDS = 0.5e-3
# Two channels of DDR4, one socket's copying, and an eager layer's Python on two cores of a Xeon.
CPU_BYTES_PER_SECOND = 20e9
CPU_COPY_BYTES_PER_SECOND = 5e9
CPU_LAYER_SECONDS = 1e-3


class Speeds(msgspec.Struct, frozen=True, kw_only=True):
    """Of a machine."""

    memory_bytes_per_second: float  # the device's
    link_bytes_per_second: float  # host memory, or the page cache, to the device
    disk_bytes_per_second: float
    layer_seconds: float  # of a layer in a step, beside reading weights


class CostModel(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model on one machine, in seconds."""

    fixed_seconds: float  # a step of any size
    request_seconds: float  # for each running request
    expert_seconds: float  # for each expert that the step uses, in all layers
    load_seconds: float  # for an expert from host memory
    disk_seconds: float  # for one from disk

    def model(self, num_running: float, num_used: float, host_ratio: float) -> StepModel:
        """Of a step of so many requests and experts; `host_ratio` of the missing ones are in host memory.

        Nothing overlaps: loads on demand do not yet, and prefetching is off unless asked for.
        """
        return StepModel(
            fixed_seconds=self.fixed_seconds + self.expert_seconds * num_used,
            request_seconds=self.request_seconds,
            load_seconds=host_ratio * self.load_seconds + (1 - host_ratio) * self.disk_seconds,
        )

    def moving(self, share: float) -> "CostModel":
        """With experts that take this share of their bytes on their way; decoding them is taken to be beside that."""
        load, disk = share * self.load_seconds, share * self.disk_seconds
        return msgspec.structs.replace(self, load_seconds=load, disk_seconds=disk)


def assumed_speeds(device: str) -> Speeds:
    is_gpu = device != "cpu"
    return Speeds(
        memory_bytes_per_second=GPU_BYTES_PER_SECOND if is_gpu else CPU_BYTES_PER_SECOND,
        link_bytes_per_second=LINK_BYTES_PER_SECOND if is_gpu else CPU_COPY_BYTES_PER_SECOND,
        disk_bytes_per_second=DISK_BYTES_PER_SECOND,
        layer_seconds=GPU_LAYER_SECONDS if is_gpu else CPU_LAYER_SECONDS,
    )


def costs_of(shape: ModelShape, speeds: Speeds, *, request_tokens: int) -> CostModel:
    """A step reads the dense weights, each expert that it uses, and each request's KV, once.

    Arithmetic is not counted: up to some 30 requests weights take longer to read than to multiply by.
    """
    bandwidth = speeds.memory_bytes_per_second
    return CostModel(
        fixed_seconds=shape.num_layers * speeds.layer_seconds + shape.dense_bytes / bandwidth,
        request_seconds=request_tokens * shape.token_bytes / bandwidth,
        expert_seconds=shape.expert_bytes / bandwidth,
        load_seconds=shape.expert_bytes / speeds.link_bytes_per_second,
        disk_seconds=shape.expert_bytes / speeds.disk_bytes_per_second,
    )
