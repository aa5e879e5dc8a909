"""A budget, a cgroup or a limit that is too small, and by how much."""

from sglmoe.errors.user_error import UserError
from sglmoe.units import show_bytes


def dense_weights_fill_budget(
    *, dense_bytes: int, budget_bytes: int, decoding_bytes: int = 0, graph_bytes: int = 0
) -> UserError:
    """`decoding_bytes`, `graph_bytes`: what decoding packed experts, and CUDA graphs, take of a device."""
    beside = f", and decoding {show_bytes(decoding_bytes)}," if decoding_bytes else ""
    beside += f", and CUDA graphs {show_bytes(graph_bytes)}," if graph_bytes else ""
    return UserError(
        f"the dense weights alone take {show_bytes(dense_bytes)}{beside} of the {show_bytes(budget_bytes)} budget; "
        "raise --memory-budget"
    )


def no_room_for_one_expert(
    *, arena_bytes: int, expert_bytes: int, needed_bytes: int, missing_bytes: int
) -> UserError:
    return UserError(
        f"the memory budget leaves {show_bytes(arena_bytes)} for experts and KV cache, but one expert "
        f"({show_bytes(expert_bytes)}) and as much KV cache take {show_bytes(needed_bytes)}: raise --memory-budget by at "
        f"least {show_bytes(missing_bytes)}"
    )


def no_room_for_kv(*, arena_bytes: int, needed_bytes: int, missing_bytes: int) -> UserError:
    return UserError(
        f"the memory budget leaves {show_bytes(arena_bytes)} for experts and KV cache, but the smallest KV cache takes "
        f"{show_bytes(needed_bytes)}: raise --memory-budget by at least {show_bytes(missing_bytes)}"
    )


def too_few_frames(
    *, num_frames: int, frame_bytes: int, floor_frames: int, missing_bytes: int
) -> UserError:
    return UserError(
        f"the memory budget holds {num_frames} frames of {show_bytes(frame_bytes)}, but {floor_frames} are needed for "
        f"experts and 1 for KV cache: raise --memory-budget by at least {show_bytes(missing_bytes)}"
    )


def graphs_beside_budget(*, taken_bytes: int, reserved_bytes: int, over_bytes: int) -> UserError:
    return UserError(
        f"CUDA graphs took {show_bytes(taken_bytes)} of the device, where {show_bytes(reserved_bytes)} of the budget were set "
        f"aside for them: lower --cuda-graph-max-bs-decode, or --memory-budget by {show_bytes(over_bytes)}"
    )


def full_graphs_need_all_experts(*, host_bytes: int, expert_bytes: int) -> UserError:
    return UserError(
        f"--cuda-graph-backend-decode=full: steps without the host bring experts in from host memory, where all have to be: "
        f"raise --host-memory from {show_bytes(host_bytes)} to {show_bytes(expert_bytes)}, or use breakable"
    )


def full_graphs_may_lack_frames(
    *, num_frames: int, context_tokens: int, missing_bytes: int
) -> UserError:
    return UserError(
        f"--cuda-graph-backend-decode=full: {num_frames} frames, which a step without the host takes for one request, and KV "
        f"of {context_tokens} tokens do not fit together, so KV may take these frames, and steps then wait for the host: raise "
        f"--memory-budget by {show_bytes(missing_bytes)}, or lower --context-length"
    )


def full_graphs_need_whole_vectors(*, expert_bytes: int, vector_bytes: int) -> UserError:
    return UserError(
        f"--cuda-graph-backend-decode=full: steps without the host move whole {show_bytes(vector_bytes)}, and an expert of "
        f"this model has {show_bytes(expert_bytes)}: use breakable"
    )


def host_memory_holds_no_expert(*, host_bytes: int, expert_bytes: int) -> UserError:
    return UserError(
        f"--host-memory: {show_bytes(host_bytes)} holds no expert, which takes "
        f"{show_bytes(expert_bytes)}; raise it or leave it out"
    )


def page_lock_refused(*, host_bytes: int, why: str) -> UserError:
    return UserError(
        f"CUDA can't page-lock {show_bytes(host_bytes)} of host memory ({why}); lower --host-memory, or raise ulimit -l"
    )


# ------------------------------------------------------------- what a plan finds on a machine, before a server starts


def no_routed_experts() -> UserError:
    return UserError(
        "the model has no routed experts, so there is nothing to page; unmodified SGLang will do"
    )


def paging_not_needed(*, num_experts: int, num_running: int) -> UserError:
    return UserError(
        f"paging is not needed: all {num_experts} experts fit beside the KV of {num_running} requests; unmodified SGLang, "
        "with CUDA graphs on a GPU, will do"
    )


def budget_beyond_device(*, budget_bytes: int, free_bytes: int) -> UserError:
    return UserError(
        f"--memory-budget of {show_bytes(budget_bytes)} is more than the "
        f"{show_bytes(free_bytes)} that are free on the device; lower it"
    )


def memory_beyond_machine(
    *, flag: str, headroom_bytes: int, needed_bytes: int, whole_bytes: int
) -> UserError:
    return UserError(
        f"{flag} and {show_bytes(headroom_bytes)} for the server itself take {show_bytes(needed_bytes)}, and the machine or "
        f"its cgroup has {show_bytes(whole_bytes)}; lower it, or raise the cgroup's limit"
    )


def memory_in_use(*, flag: str, taken_bytes: int, available_bytes: int) -> UserError:
    return UserError(
        f"{flag} may grow to {show_bytes(taken_bytes)}, and other programs leave "
        f"{show_bytes(available_bytes)} now; lower it or end them"
    )


def experts_on_disk(*, missing_bytes: int, holder: str, held_bytes: int) -> UserError:
    return UserError(
        f"{show_bytes(missing_bytes)} of experts are in no frame and {holder} holds at most {show_bytes(held_bytes)} of them: "
        "the rest is read from the checkpoint, which should be on an SSD of this machine"
    )


def memlock_too_low(*, host_bytes: int, memlock_bytes: int) -> UserError:
    return UserError(
        f"--host-memory of {show_bytes(host_bytes)} is page-locked, and ulimit -l allows {show_bytes(memlock_bytes)}: where "
        "CUDA refuses, the server does not start; set memlock to unlimited (ulimit -l, LimitMEMLOCK=infinity, docker "
        "--ulimit memlock=-1)"
    )


def address_space_too_low(*, mapped_bytes: int, address_bytes: int) -> UserError:
    return UserError(
        f"checkpoint and memory take {show_bytes(mapped_bytes)} of addresses and ulimit -v allows "
        f"{show_bytes(address_bytes)}; set it to unlimited"
    )


def experts_held_beside_budget(*, held_bytes: int) -> UserError:
    return UserError(
        f"{show_bytes(held_bytes)} of experts are held in memory beside the budget: their tensors are not views of a mapped "
        "file (another --dtype than the checkpoint's, scales that are no float32, sizes rounded up on a CPU, or no safetensors)"
    )
