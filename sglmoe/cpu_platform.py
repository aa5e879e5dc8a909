"""SGLang platform plugin: serve on any CPU, with or without AMX, through torch's own kernels.

The entry point `activate` (group ``sglang.srt.platforms``) is called in every SGLang process. The
unmodified server finds it too, so that the two servers run the same kernels and can be compared.
SGLang's attention backend here is ``torch_native``; kernels that exist for GPUs only are replaced
by `sglmoe.cpu_kernels` once a model is loaded. Knows nothing of the rest of sglmoe.
"""

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities


def activate() -> str | None:
    """Name the platform class where there is no accelerator; None leaves the choice to SGLang.

    ``SGLANG_USE_CPU_ENGINE=1`` asks for SGLang's own CPU engine, which needs AMX.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" or torch.accelerator.is_available():
        return None
    return f"{__name__}.{CpuPlatform.__name__}"


class CpuPlatform(CpuSRTPlatform):
    """A CPU on which only torch's kernels are assumed: no Triton, no sgl_kernel, no graphs."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_quantization_config(self, quantization: str) -> type[Any] | None:
        if quantization != "moe_wna16":
            return None  # SGLang's own
        from sglmoe.cpu_gptq import CpuInt4Config

        return CpuInt4Config

    def init_backend(self) -> None:
        # SGLang decorates small functions with torch.compile: on a CPU that is a C++ compiler
        # and ten seconds at the first request, for nothing.
        torch._dynamo.config.disable = True

    def post_load_model(self, model: torch.nn.Module) -> None:
        # Not earlier: what is replaced is imported by now, and only workers load models.
        from sglmoe.cpu_kernels import replace_gpu_kernels

        replace_gpu_kernels()
