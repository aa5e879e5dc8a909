"""CUDA graphs on the pretended device: `e2e/recorded_graphs.py`, with kernels in them. In a fork only (`forking`)."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from cuda_device import Device
from recorded_graphs import RecordedGraph, tensors, whole_graph


def record_graphs(device: Device) -> None:
    """Have SGLang capture what its flags say: between `start_process` and `load_model`."""
    from sglang.srt.model_executor import runner_backend_utils
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner

    weak_ref_tensor = ModuleType("weak_ref_tensor")  # SGLang's is for GPUs alone
    weak_ref_tensor.weak_ref_tensors = weak_ref_tensor.weak_ref_tensor = lambda its: its
    sys.modules[f"{runner_backend_utils.__name__}.weak_ref_tensor"] = weak_ref_tensor
    start_runners = ModelRunner.init_cuda_graphs

    def init_cuda_graphs(self: Any) -> None:
        start_runners(self)  # a platform of ours has none
        self.decode_cuda_graph_runner = decode_cuda_graph_runner.DecodeCudaGraphRunner(
            self, attn_backend=self.decode_attn_backend
        )

    ModelRunner.init_cuda_graphs = init_cuda_graphs

    class Graph(RecordedGraph):
        def capture_begin(self, **options: Any) -> None:
            super().capture_begin(**options)
            device.capture = capture

        def capture_end(self) -> None:
            device.capture = None
            super().capture_end()

    cuda: dict[str, Any] = {
        "CUDAGraph": Graph,
        "graph": whole_graph,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: device.capture is not None,
    }
    for name, instead in cuda.items():
        setattr(torch.cuda, name, instead)
    decode_cuda_graph_runner.graph_capture = lambda stream: nullcontext(
        SimpleNamespace(stream=stream)
    )


def capture(kernel: Callable[[], None], *arguments: Any) -> None:
    recorder, (first, *_) = RecordedGraph.recorder, tensors(arguments)
    assert recorder is not None

    def run() -> torch.Tensor:
        kernel()
        return first

    recorder.as_one(run, arguments)
