"""What the operator asked of sglmoe, and the defaults that a machine gives.

Pure: knows neither torch nor sglang, reads no file and no environment variable.
"""

import msgspec

from sglmoe.units import parse_bytes, show_bytes

# Arbitrary. The rest is for activations, graphs and workspaces on a GPU ...
GPU_BUDGET_RATIO = 0.85
# ... and on a CPU for the four processes and the page cache that holds the checkpoint, the tier below the arena.
CPU_BUDGET_RATIO = 0.5
# Arbitrary. Of the memory beside a GPU, for experts that are not on it.
HOST_RATIO = 0.7


class Machine(msgspec.Struct, frozen=True):
    """The memory of the machine we run on, as far as we may use it."""

    device_bytes: int  # the GPU's memory, or on a CPU what the cgroup allows
    free_device_bytes: int
    host_bytes: int
    has_gpu: bool


class Options(msgspec.Struct, frozen=True):
    """Our own flags, as they were written."""

    memory_budget: str | None = None
    host_memory: str | None = None


class EngineConfig(msgspec.Struct, frozen=True):
    """What scheduler and worker need to know beside sglang's ServerArgs, every default filled in."""

    memory_budget_bytes: int  # device memory for dense weights and the arena
    host_memory_bytes: int  # host memory for experts; 0 on a CPU, where the page cache is that tier
    page_tokens: int | None = None  # tokens in a KV page; None leaves it to the arena's geometry


def plan_config(options: Options, machine: Machine, *, page_tokens: int | None) -> EngineConfig:
    """Fill in what was not asked for, and refuse what the machine has not got.

    Raises ValueError, naming the flag and the numbers.
    """
    return EngineConfig(
        memory_budget_bytes=_budget_bytes(options.memory_budget, machine),
        host_memory_bytes=_host_bytes(options.host_memory, machine),
        page_tokens=page_tokens,
    )


def _budget_bytes(text: str | None, machine: Machine) -> int:
    if text is None:
        ratio = GPU_BUDGET_RATIO if machine.has_gpu else CPU_BUDGET_RATIO
        return int(machine.free_device_bytes * ratio)
    return _within(text, machine.device_bytes, flag="--memory-budget")


def _host_bytes(text: str | None, machine: Machine) -> int:
    if machine.has_gpu:
        if text is None:
            return int(machine.host_bytes * HOST_RATIO)
        return _within(text, machine.host_bytes, flag="--host-memory")
    if text is not None:
        raise ValueError(
            "--host-memory: on a CPU the budget is host memory already; use --memory-budget"
        )
    return 0


def _within(text: str, whole_bytes: int, *, flag: str) -> int:
    try:
        size_bytes = parse_bytes(text, whole_bytes=whole_bytes)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    if size_bytes > whole_bytes:
        raise ValueError(
            f"{flag}: {text} is more than the {show_bytes(whole_bytes)} there are; ask for less"
        )
    return size_bytes
