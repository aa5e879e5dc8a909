"""Our worker without its process: a model loaded in this one, which has to be a fork (`forking`)."""

from array import array
from pathlib import Path
from typing import Any

import msgspec
from serving import free_port

from sglmoe.protocol import NewRequest, Row, StepPlan


class LoadedWorker:
    """A model on our memory, and the worker that computes steps with it. One a process."""

    def __init__(self, model_dir: Path, **flags: Any):
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import ServerArgs

        from sglmoe.config import Options
        from sglmoe.preparation import prepare
        from sglmoe.worker.model_runner import ModelRunner
        from sglmoe.worker.model_runner_loading import load_model, start_process
        from sglmoe.worker.worker import Worker

        load_plugins()
        server_args = ServerArgs(
            model_path=str(model_dir),
            max_running_requests=4,
            random_seed=0,
            log_level="warning",
            **flags,
        )
        config = prepare(server_args, Options(memory_budget="64MB"))
        start_process(server_args, 0, process_name="WORKER")
        self.loaded = load_model(
            server_args,
            gpu_id=0,
            nccl_port=free_port(),
            config=config,
            on_progress=lambda *_: None,
        )
        self._model = ModelRunner(self.loaded, server_args)
        self._worker = Worker(
            memory=self.loaded.memory, model=self._model, max_running=self.loaded.max_running
        )

    def prefill(self, token_ids: list[int]) -> int:
        """Compute a prompt in one step; the token that follows, greedily."""
        from sglang.srt.sampling.sampling_params import SamplingParams

        sampling = SamplingParams(temperature=0, max_new_tokens=1)
        sampling.normalize(None)
        request = NewRequest(
            rid="prompt",
            prompt_ids=array("i", token_ids).tobytes(),
            output_ids=b"",
            sampling=msgspec.msgpack.encode(sampling),
            max_new_tokens=1,
            namespace="",
            logprobs=None,
            routed_experts_start=None,
            requires_reasoning=False,
        )
        self._model.add(self._worker.add(request))
        result = self._worker.step(StepPlan(0, rows=(Row("prompt", len(token_ids)),)))
        (row,) = result.rows
        assert row.token_id is not None
        return row.token_id
