"""SGLang's model runner on the pretended device: who asks the driver is answered here, and kernels that no CPU's torch has are
stood in for. Dense layers are SGLang's for CPUs; its attention and its fused MoE sequence are those of GPUs, as far as they are
Triton's. In a fork only (`forking`)."""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from aligned import align
from cuda_device import CudaTensor, Device, held, pretend_cuda

GPU_BYTES = 80 * 2**30
# With fp8, and without kernels that begin before the one in front of them has ended.
CAPABILITY = (8, 9)
# What torch.cuda answers.
DRIVER: dict[str, Any] = {
    "get_device_capability": CAPABILITY,
    "mem_get_info": (GPU_BYTES, GPU_BYTES),
    "current_device": 0,
    "set_device": None,
    "empty_cache": None,
    "device_count": 1,
    "get_device_name": "none",
    "memory_allocated": 0,
    "memory_reserved": 0,
    "get_device_properties": SimpleNamespace(
        total_memory=GPU_BYTES,
        multi_processor_count=128,
        name="none",
        is_integrated=False,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
    ),
}


@contextmanager
def sglang_on_it() -> Generator[Device, None, None]:
    from sglang.srt.distributed import bootstrap
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe, fused_moe_triton_config
    from sglang.srt.layers.rotary_embedding import rope_variant
    from sglang.srt.mem_cache import memory_pool
    from sglang.srt.models import deepseek_v2
    from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mha

    from sglmoe import machine, preparation
    from sglmoe.memory.device_transfer import DeviceCopier, StreamCopier
    from sglmoe.worker.step_messages import Letters

    start_groups = bootstrap.init_parallel_runtime

    def start_groups_on_cpu(*, device: str, **options: Any) -> None:
        start_groups(device="cpu", **options)

    ours: list[tuple[Any, str, Any]] = [
        (preparation, "choose_device", lambda device: "cuda"),
        (machine, "gpu_memory_bytes", lambda *_: (GPU_BYTES, GPU_BYTES)),
        (bootstrap, "init_parallel_runtime", start_groups_on_cpu),
        (fused_moe_triton_config, "get_device_name", lambda: "none"),
        (rope_variant, "get_device", lambda: "cuda"),
        (memory_pool, "_is_cuda", True),
        (memory_pool, "can_use_store_cache", lambda *row_bytes: True),
        (forward_mha, "_is_cuda", True),
        # Else experts' outputs are scaled twice: there, and as on CUDA.
        (deepseek_v2, "_is_cuda", True),
    ]
    with ExitStack() as stack:
        for name, answer in DRIVER.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, a=answer: a))
        for where, name, instead in ours:
            stack.enter_context(patch.object(where, name, instead))
        device = stack.enter_context(pretend_cuda())
        stack.enter_context(patch.object(fused_moe, "moe_align_block_size", aligned_on(device)))
        stack.enter_context(
            patch.object(memory_pool, "store_cache", stored_on(device), create=True)
        )
        for kind in (DeviceCopier, StreamCopier, Letters):  # their defaults are older
            defaults = {"new_event": torch.cuda.Event, "on_stream": torch.cuda.stream}
            its = kind.__init__.__kwdefaults__
            stack.enter_context(patch.dict(its, {k: v for k, v in defaults.items() if k in its}))
        yield device


def aligned_on(device: Device) -> Callable[..., tuple[torch.Tensor, ...]]:
    """SGLang's `moe_align_block_size`, whose kernel is not Triton's."""

    def aligned(ids: torch.Tensor, block_tokens: int, num_experts: int) -> tuple[torch.Tensor, ...]:
        def align_now() -> tuple[torch.Tensor, ...]:
            its = align(held(ids), block_tokens, num_experts)
            return its.sorted_ids, its.expert_ids, its.num_padded

        made = align_now()

        def align_again() -> None:
            for place, its in zip(made, align_now(), strict=True):
                place.copy_(its)

        device.launch("moe_align_block_size", align_again, ids, *made)
        return tuple(CudaTensor(its) for its in made)

    return aligned


def stored_on(device: Device) -> Callable[..., None]:
    """SGLang's `store_cache`, a kernel of CUDA's own: an id that is too large stops the device, and nothing is stored at 0."""

    def store(
        keys: torch.Tensor,
        values: torch.Tensor,
        key_rows: torch.Tensor,
        value_rows: torch.Tensor,
        ids: torch.Tensor,
        *,
        size_limit: int,
        **row_bytes: int,
    ) -> None:
        def store_now() -> None:
            places = held(ids)
            assert (places < size_limit).all(), f"{places.max()} is no id below {size_limit}"
            is_stored = places != 0
            for rows, new in ((key_rows, keys), (value_rows, values)):
                held(rows)[places[is_stored]] = held(new)[is_stored]

        device.launch("store_cache", store_now, keys, values, key_rows, value_rows, ids)

    return store
