"""How much memory this machine gives us: the cgroup's limit, the system's, the GPU's.

Asks the kernel and NVML, never CUDA: the launcher must not hold a context on the device.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from sglmoe.config import Machine

# Device files of NVIDIA and AMD GPUs, Ascend NPUs and WSL.
ACCELERATOR_FILES = ("nvidiactl", "kfd", "davinci_manager", "dxg")


def has_accelerator(dev: Path = Path("/dev")) -> bool:
    """Whether there may be one. Cheap, and cautious: a device file may exist without a usable device."""
    return any((dev / name).exists() for name in ACCELERATOR_FILES)


def measure_machine(*, device: str, gpu_id: int) -> Machine:
    """Measure the machine; `device` is torch's name of the kind, ``"cpu"`` or ``"cuda"``."""
    host_bytes = host_memory_bytes()
    if device == "cpu":
        return Machine(
            device_bytes=host_bytes,
            free_device_bytes=host_bytes,
            host_bytes=host_bytes,
            has_gpu=False,
        )
    free_bytes, total_bytes = gpu_memory_bytes(gpu_id, os.environ)
    return Machine(
        device_bytes=total_bytes,
        free_device_bytes=free_bytes,
        host_bytes=host_bytes,
        has_gpu=True,
    )


def host_memory_bytes(root: Path = Path("/")) -> int:
    """The least of the system's memory and the limits of the cgroups that this process is in, v1 and v2."""
    return min([int(psutil.virtual_memory().total), *cgroup_limits(root)])


def cgroup_limits(root: Path) -> Iterator[int]:
    """Every memory limit above this process, in bytes. `root` holds ``proc`` and ``sys``."""
    membership = root / "proc/self/cgroup"
    mounts = root / "sys/fs/cgroup"
    if not membership.exists():
        return
    for line in membership.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            yield from _limits_above(mounts, group, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_above(mounts / "memory", group, "memory.limit_in_bytes")


def _limits_above(mount: Path, group: str, file_name: str) -> Iterator[int]:
    folder = mount / group.lstrip("/")
    for candidate in [folder, *folder.parents]:
        if not candidate.is_relative_to(mount):
            return
        limit = candidate / file_name
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            yield int(text)


def gpu_memory_bytes(gpu_id: int, environ: Mapping[str, str]) -> tuple[int, int]:
    """Free and total bytes of the GPU that CUDA would call `gpu_id`."""
    import pynvml

    pynvml.nvmlInit()
    try:
        visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
        name = visible[gpu_id] if visible != [""] else str(gpu_id)
        by_index = name.isdigit()
        find = pynvml.nvmlDeviceGetHandleByIndex if by_index else pynvml.nvmlDeviceGetHandleByUUID
        handle = find(int(name) if by_index else name)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return memory.free, memory.total
    finally:
        pynvml.nvmlShutdown()
