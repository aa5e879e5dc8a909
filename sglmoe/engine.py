"""`sglmoe.Engine`: sglang's offline `Engine`, with sglmoe's scheduler and worker in it.

One of the files that know sglang.
"""

from typing import Any

from sglmoe import start_up

start_up.start_importing()  # before sglang is imported here, so that both happen at the same time

from sglang.srt.entrypoints.engine import Engine as SglangEngine  # noqa: E402
from sglang.srt.plugins import load_plugins  # noqa: E402

from sglmoe.config import Options  # noqa: E402
from sglmoe.demo_model import DEMO_MODEL  # noqa: E402
from sglmoe.preparation import detokenizer_entry, prepare, scheduler_entry  # noqa: E402


class Engine(SglangEngine):
    """As `sglang.Engine`, which documents the methods, under one memory budget.

    `memory_budget`, `host_memory`, `memory_policy`, `memory_planner`, `expert_prefetch`, `expert_predictor`, `fill_passes`,
    `expert_affinity`, `ttft_target`, `itl_target`, `packed_experts` and `packed_share` are what the server's flags take,
    such as ``"2GiB"``. All else is sglang's ServerArgs; without `model_path` the demo model is loaded. Raises ValueError for
    what can't be served.
    """

    run_detokenizer_process_func = detokenizer_entry()

    def __init__(
        self,
        *,
        memory_budget: str | None = None,
        host_memory: str | None = None,
        memory_policy: str | None = None,
        memory_planner: str | None = None,
        expert_prefetch: str | None = None,
        expert_predictor: str | None = None,
        fill_passes: str | None = None,
        expert_affinity: str | None = None,
        ttft_target: str | None = None,
        itl_target: str | None = None,
        packed_experts: str | None = None,
        packed_share: str | None = None,
        **flags: Any,
    ):
        load_plugins()
        server_args = flags.pop("server_args", None) or self._read_server_args(flags)
        options = Options(
            memory_budget=memory_budget,
            host_memory=host_memory,
            memory_policy=memory_policy,
            memory_planner=memory_planner,
            expert_prefetch=expert_prefetch,
            expert_predictor=expert_predictor,
            fill_passes=fill_passes,
            expert_affinity=expert_affinity,
            ttft_target=ttft_target,
            itl_target=itl_target,
            packed_experts=packed_experts,
            packed_share=packed_share,
        )
        config = prepare(server_args, options)
        self.run_scheduler_process_func = scheduler_entry(config)
        start_up.keep_start_method()
        super().__init__(server_args=server_args)

    def _read_server_args(self, flags: dict[str, Any]) -> Any:
        if "model_path" not in flags:
            flags["model_path"] = str(DEMO_MODEL)
        return self.server_args_class(**({"log_level": "error"} | flags))
