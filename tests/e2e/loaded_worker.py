"""Our worker without its process: a model loaded in this one, which has to be a fork (`forking`)."""

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from serving import free_port

from sglmoe.protocol import LogprobSpec, NewRequest, Row, StepPlan, StepResult


class LoadedWorker:
    """A model on our memory, and the worker that computes steps with it. One a process."""

    def __init__(
        self,
        model_dir: Path,
        *,
        budget: str = "64MB",
        host_memory: str | None = None,
        expert_prefetch: str | None = None,
        packed_experts: str | None = None,
        packed_share: str | None = None,
        before_loading: Callable[[], None] | None = None,
        **flags: Any,
    ):
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
            random_seed=0,
            log_level="warning",
            **{"max_running_requests": 4} | flags,
        )
        config = prepare(
            server_args,
            Options(
                memory_budget=budget,
                host_memory=host_memory,
                expert_prefetch=expert_prefetch,
                packed_experts=packed_experts,
                packed_share=packed_share,
            ),
        )
        start_process(server_args, 0, process_name="WORKER")
        if before_loading is not None:
            before_loading()
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

    def add(
        self,
        rid: str,
        token_ids: list[int],
        *,
        num_tokens: int = 1,
        logprobs: LogprobSpec | None = None,
        routed_experts_start: int | None = None,
    ) -> None:
        """A request that wants so many tokens, greedily."""
        from sglang.srt.sampling.sampling_params import SamplingParams

        sampling = SamplingParams(temperature=0, max_new_tokens=num_tokens, ignore_eos=True)
        sampling.normalize(None)
        request = NewRequest(
            rid=rid,
            prompt_ids=array("i", token_ids).tobytes(),
            output_ids=b"",
            sampling=msgspec.msgpack.encode(sampling),
            max_new_tokens=num_tokens,
            namespace="",
            logprobs=logprobs,
            routed_experts_start=routed_experts_start,
            requires_reasoning=False,
        )
        self._model.add(self._worker.add(request))

    def step(self, *rows: Row) -> StepResult:
        return self._worker.step(StepPlan(0, rows=rows))

    def steps(
        self, *rows: Row, num_steps: int, on_begun: Callable[[], None] = lambda: None
    ) -> tuple[list[StepResult], int]:
        """These rows in so many steps, of which each begins before the one in front of it is finished, if it can: results, and
        how many could."""
        worker, plan = self._worker, StepPlan(0, rows=rows)
        results, num_followed = [], 0
        running = worker.begin(plan)
        for _ in range(num_steps - 1):
            on_begun()
            following = worker.follow(plan, running)
            on_begun()
            results.append(worker.finish(running, is_followed=following is not None))
            num_followed += following is not None
            running = following or worker.begin(plan)
        return [*results, worker.finish(running)], num_followed

    def prefill(self, token_ids: list[int]) -> int:
        """Compute a prompt in one step; the token that follows, greedily."""
        self.add("prompt", token_ids)
        (row,) = self.step(Row("prompt", len(token_ids))).rows
        assert row.token_id is not None
        return row.token_id
