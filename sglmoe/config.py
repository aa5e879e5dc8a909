"""What the operator asked of sglmoe, and the defaults that a machine gives.

Pure: knows neither torch nor sglang, reads no file and no environment variable.
"""

import re
from enum import Enum

import msgspec

from sglmoe.errors.options import (
    more_than_there_is,
    not_a_choice,
    not_a_share,
    not_a_size,
    not_seconds,
    not_seconds_above_0,
    packed_share_without_values,
    together_more_than_there_is,
    ttft_target_without_filling,
    unknown_packed_experts,
    unknown_packed_share,
    unknown_predictor,
)
from sglmoe.units import parse_bytes

_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)%")

AUTO = "auto"  # the predictor that does best; packed experts where there are any
ON, OFF = "on", "off"
# Those that need no training, trained ones that are beside the model, and two that are wrong, to compare with.
PREDICTORS = (
    *(AUTO, "last_step", "previous_layer", "frequency", "expert_map", "pregate"),
    *("routing_path", "hybrid", "random", "contrary"),
)

# Arbitrary. The rest is for activations and workspaces on a GPU ...
GPU_BUDGET_RATIO = 0.85
# ... and on a CPU for the four processes and the page cache that holds the checkpoint, the tier below the arena.
CPU_BUDGET_RATIO = 0.5
# Arbitrary: requests that may run at once, where --max-running-requests does not say.
DEFAULT_MAX_RUNNING = 256
# Arbitrary: how long requests may go on after SIGTERM.
SHUTDOWN_SECONDS = 60.0
# Arbitrary. Of the memory beside a GPU, for experts that are not on it.
HOST_RATIO = 0.7


class MemoryPolicy(Enum):
    """`--memory-policy`: who gives way when memory is full. All but the first are there to be compared with."""

    COST_AWARE = "cost-aware"  # what saves the fewest seconds per byte
    LRU = "lru"  # what was used longest ago
    LFU = "lfu"  # what was used least often since the start
    STATIC = "static"  # LRU within a fixed share for experts, the same for each layer, and the rest for KV


class PrefetchMode(Enum):
    """`--expert-prefetch`: whether experts are brought in before their layer asks for them."""

    OFF = "off"
    OBSERVE = "observe"  # predict and keep score, move nothing
    ON = "on"


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
    memory_policy: str | None = None
    memory_planner: str | None = None
    expert_prefetch: str | None = None
    expert_predictor: str | None = None
    fill_passes: str | None = None
    expert_affinity: str | None = None
    ttft_target: str | None = None
    itl_target: str | None = None
    shutdown_timeout: str | None = None  # the server's; an engine has none
    packed_experts: str | None = None
    packed_share: str | None = None


class EngineConfig(msgspec.Struct, frozen=True):
    """What scheduler and worker need to know beside sglang's ServerArgs, every default filled in."""

    memory_budget_bytes: int  # device memory for dense weights and the arena
    host_memory_bytes: int  # for experts that are in no frame; beside the budget
    page_tokens: int | None = None  # tokens in a KV page; None leaves it to the arena's geometry
    memory_policy: MemoryPolicy = MemoryPolicy.COST_AWARE
    expert_ratio: float = 0.0  # the share of the arena that MemoryPolicy.STATIC gives to experts
    memory_planner: bool = True  # limit the running requests to what leaves experts enough frames
    expert_prefetch: PrefetchMode = PrefetchMode.OFF
    expert_predictor: str = AUTO  # a name, a trained predictor's file, or AUTO
    fill_passes: bool = False  # collect prompts where each pass over them pays for its experts
    expert_affinity: bool = False  # admit requests that share tokens with those that run
    ttft_target_seconds: float | None = None  # to the first token; bounds the collecting
    itl_target_seconds: float | None = None  # between tokens; bounds what runs together
    packed_experts: str = AUTO  # OFF, ON, AUTO, or the folder they are in
    packed_share: float | None = (
        0.0  # of the frames that KV leaves, for packed experts; None: planned
    )


def plan_config(options: Options, machine: Machine, *, page_tokens: int | None) -> EngineConfig:
    """Fill in what was not asked for, and refuse what the machine has not got.

    Raises ValueError, naming the flag and the numbers.
    """
    memory_policy, expert_ratio = parse_memory_policy(options.memory_policy)
    budget_bytes = _budget_bytes(options.memory_budget, machine)
    host_bytes = _host_bytes(options.host_memory, machine)
    if not machine.has_gpu and budget_bytes + host_bytes > machine.host_bytes:
        raise together_more_than_there_is(
            budget_bytes=budget_bytes,
            host_bytes=host_bytes,
            whole_bytes=machine.host_bytes,
            is_default_budget=not options.memory_budget,
        )
    return EngineConfig(
        memory_budget_bytes=budget_bytes,
        host_memory_bytes=host_bytes,
        page_tokens=page_tokens,
        memory_policy=memory_policy,
        expert_ratio=expert_ratio,
        memory_planner=parse_memory_planner(options.memory_planner),
        expert_prefetch=parse_expert_prefetch(options.expert_prefetch),
        expert_predictor=parse_expert_predictor(options.expert_predictor),
        fill_passes=parse_fill_passes(options.fill_passes),
        expert_affinity=parse_expert_affinity(options.expert_affinity),
        ttft_target_seconds=parse_ttft_target(options.ttft_target, options.fill_passes),
        itl_target_seconds=parse_target("--itl-target", options.itl_target),
        packed_experts=parse_packed_experts(options.packed_experts),
        packed_share=_packed_share(options, memory_policy),
    )


def parse_expert_prefetch(text: str | None) -> PrefetchMode:
    """Read ``"on"``. Raises ValueError."""
    modes = {mode.value: mode for mode in PrefetchMode}
    if text is not None and text not in modes:
        raise not_a_choice(flag="--expert-prefetch", given=text, choices=list(modes))
    return PrefetchMode.OFF if text is None else modes[text]


def parse_memory_planner(text: str | None) -> bool:
    """Read ``"on"``, the default, or ``"off"``. Raises ValueError."""
    if text is not None and text not in (ON, OFF):
        raise not_a_choice(flag="--memory-planner", given=text, choices=(ON, OFF))
    return text != "off"


def parse_memory_policy(text: str | None) -> tuple[MemoryPolicy, float]:
    """Read ``"lru"`` or ``"static=60%"``: the policy, and the experts' share if it is static. Raises ValueError."""
    if text is None:
        return MemoryPolicy.COST_AWARE, 0.0
    name, _, share = text.partition("=")
    known = {policy.value: policy for policy in MemoryPolicy}
    policy = known.get(name)
    if policy is None or (policy is MemoryPolicy.STATIC) != bool(share):
        choices = [*(name for name in known if name != "static"), "static=60%"]
        raise not_a_choice(flag="--memory-policy", given=text, choices=choices)
    if not share:
        return policy, 0.0
    match = _SHARE.fullmatch(share)
    if not match or not 0 < float(match[1]) < 100:
        raise not_a_share(flag="--memory-policy", given=share)
    return policy, float(match[1]) / 100


def parse_expert_predictor(text: str | None) -> str:
    """Read a name, a trained predictor's path, or ``"auto"``, the default. Raises ValueError."""
    if text is None:
        return AUTO
    if text not in PREDICTORS and not text.endswith(".json"):
        raise unknown_predictor(given=text, known=PREDICTORS)
    return text


def parse_fill_passes(text: str | None) -> bool:
    """Read ``"on"`` or ``"off"``, the default. Raises ValueError."""
    if text is not None and text not in (ON, OFF):
        raise not_a_choice(flag="--fill-passes", given=text, choices=(ON, OFF))
    return text == "on"


def parse_expert_affinity(text: str | None) -> bool:
    """Read ``"on"`` or ``"off"``, the default. Raises ValueError."""
    if text is not None and text not in (ON, OFF):
        raise not_a_choice(flag="--expert-affinity", given=text, choices=(ON, OFF))
    return text == "on"


def parse_ttft_target(text: str | None, fill_passes: str | None) -> float | None:
    """Read a number of seconds, for passes that are filled. Raises ValueError."""
    if text is not None and not parse_fill_passes(fill_passes):
        raise ttft_target_without_filling()
    return parse_target("--ttft-target", text)


def parse_target(flag: str, text: str | None) -> float | None:
    """Read a number of seconds, None for no target. Raises ValueError."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise not_seconds_above_0(flag=flag, given=text)
    return seconds


def parse_shutdown_timeout(text: str | None) -> float:
    """Read a number of seconds. Raises ValueError."""
    if text is None:
        return SHUTDOWN_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise not_seconds(flag="--shutdown-timeout", given=text)
    return seconds


def parse_packed_experts(text: str | None) -> str:
    """Read ``"off"``, ``"on"``, ``"auto"``, the default, or a folder. Raises ValueError."""
    if text is None:
        return AUTO
    if text not in (OFF, ON, AUTO) and "/" not in text:
        raise unknown_packed_experts(given=text)
    return text


def parse_packed_share(text: str | None) -> float | None:
    """Read ``"off"``, the default: 0; ``"30%"``; or ``"auto"``: None. Raises ValueError."""
    if text in (None, OFF):
        return 0.0
    if text == AUTO:
        return None
    match = _SHARE.fullmatch(text)
    if not match or not 0 < float(match[1]) < 100:
        raise unknown_packed_share(given=text)
    return float(match[1]) / 100


def _packed_share(options: Options, policy: MemoryPolicy) -> float | None:
    share = parse_packed_share(options.packed_share)
    if share != 0.0 and policy is not MemoryPolicy.COST_AWARE:
        raise packed_share_without_values(given=str(options.packed_share), policy=policy.value)
    return share


def _budget_bytes(text: str | None, machine: Machine) -> int:
    if text is None:
        ratio = GPU_BUDGET_RATIO if machine.has_gpu else CPU_BUDGET_RATIO
        return int(machine.free_device_bytes * ratio)
    return _within(text, machine.device_bytes, flag="--memory-budget")


def _host_bytes(text: str | None, machine: Machine) -> int:
    if text is not None:
        return _within(text, machine.host_bytes, flag="--host-memory")
    # On a CPU the page cache is that tier.
    return int(machine.host_bytes * HOST_RATIO) if machine.has_gpu else 0


def _within(text: str, whole_bytes: int, *, flag: str) -> int:
    try:
        size_bytes = parse_bytes(text, whole_bytes=whole_bytes)
    except ValueError as error:
        raise not_a_size(flag=flag, why=str(error)) from None
    if size_bytes > whole_bytes:
        raise more_than_there_is(flag=flag, given=text, whole_bytes=whole_bytes)
    return size_bytes
