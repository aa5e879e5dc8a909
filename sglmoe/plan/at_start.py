"""What a server says of its plan before it starts."""

from sglmoe.config import EngineConfig, Options
from sglmoe.machine import measure_machine
from sglmoe.plan.budgets import Demand
from sglmoe.plan.cost_model import assumed_speeds, costs_of
from sglmoe.plan.launch_plan import Question, plan_launch
from sglmoe.plan.machine_limits import measure_limits
from sglmoe.plan.model_shape import read_model
from sglmoe.plan.packed import stored_bytes_of
from sglmoe.plan.report import short_report
from sglmoe.plan.server_flags import ServerFlags


def start_report(
    config: EngineConfig, *, model_path: str, flags: ServerFlags, device: str, gpu_id: int
) -> str:
    """A few lines. No plan is no reason not to start: then they say why there is none."""
    try:
        model = read_model(model_path, dtype=flags.dtype, device=device)
        question = Question(
            model_path=model_path,
            shape=model.shape,
            machine=measure_machine(device=device, gpu_id=gpu_id),
            limits=measure_limits(),
            demand=Demand(),
            # Speeds are not told: measuring them would keep the server from starting.
            costs=costs_of(model.shape, assumed_speeds(device), request_tokens=1),
            costs_are="",
            stored_bytes=stored_bytes_of(model, flags.packed_experts, device),
            options=Options(
                memory_budget=str(config.memory_budget_bytes),
                host_memory=str(config.host_memory_bytes) if config.host_memory_bytes else None,
            ),
            memory_policy=config.memory_policy,
            budgets=(config.memory_budget_bytes,),
            flags=flags,
        )
        return short_report(plan_launch(question))
    except (ValueError, KeyError, OSError) as error:
        return f"no plan for {model_path}: {error}"
