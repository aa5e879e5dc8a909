"""Will this machine do? What a kernel, a cgroup or a shell may refuse a server, compared with what it asks for."""

import resource
from enum import Enum

import msgspec
import psutil

from sglmoe.config import Machine
from sglmoe.errors import budgets
from sglmoe.errors.user_error import UserError
from sglmoe.plan.budgets import BudgetPlan
from sglmoe.plan.model_shape import ModelShape

# Arbitrary: for the server's four processes and all else on the machine.
HEADROOM_BYTES = 2 * 2**30


class Limits(msgspec.Struct, frozen=True):
    """Beside memory itself; None for no limit, or where it is not known because the machine is not here."""

    available_bytes: int | None = None  # host memory that nobody uses now
    memlock_bytes: int | None = None
    address_space_bytes: int | None = None


class Severity(Enum):
    NOTE = "note"
    WARNING = "warning"  # it will start, and be slower or later than it need be
    PROBLEM = "problem"  # it will not start, or not last


class Finding(msgspec.Struct, frozen=True):
    severity: Severity
    text: str

    def __str__(self) -> str:
        return f"{self.severity.value}: {self.text}"


def warning(message: UserError) -> Finding:
    return Finding(Severity.WARNING, str(message))


def problem(message: UserError) -> Finding:
    return Finding(Severity.PROBLEM, str(message))


def measure_limits() -> Limits:
    return Limits(
        available_bytes=int(psutil.virtual_memory().available),
        memlock_bytes=_soft_limit(resource.RLIMIT_MEMLOCK),
        address_space_bytes=_soft_limit(resource.RLIMIT_AS),
    )


def _soft_limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def find_problems(
    shape: ModelShape, plan: BudgetPlan, machine: Machine, limits: Limits
) -> list[Finding]:
    """What an operator should know before a server with this plan starts. Pure."""
    if plan.refusal:
        return [Finding(Severity.PROBLEM, plan.refusal)]
    found = [_when_paging_is_not_needed(plan, shape), _beyond_the_device(plan, machine)]
    found += [_host_memory(shape, plan, machine), _available(plan, machine, limits)]
    found += [_on_disk(shape, plan, machine), _memlock(plan, machine, limits)]
    found += [_address_space(shape, plan, machine, limits)]
    return [finding for finding in found if finding]


def _when_paging_is_not_needed(plan: BudgetPlan, shape: ModelShape) -> Finding | None:
    if not shape.num_experts:
        return warning(budgets.no_routed_experts())
    if any(forecast.expert_frames < shape.all_experts for forecast in plan.forecasts):
        return None
    return warning(
        budgets.paging_not_needed(
            num_experts=shape.all_experts, num_running=plan.forecasts[-1].num_running
        )
    )


def _beyond_the_device(plan: BudgetPlan, machine: Machine) -> Finding | None:
    if plan.budget_bytes <= machine.free_device_bytes:
        return None
    return problem(
        budgets.budget_beyond_device(
            budget_bytes=plan.budget_bytes, free_bytes=machine.free_device_bytes
        )
    )


def _taken_of_host(plan: BudgetPlan, machine: Machine) -> int:
    return plan.host_bytes + (0 if machine.has_gpu else plan.budget_bytes)


def _flags(machine: Machine) -> str:
    return "--host-memory" if machine.has_gpu else "--memory-budget and --host-memory together"


def _host_memory(shape: ModelShape, plan: BudgetPlan, machine: Machine) -> Finding | None:
    needed = _taken_of_host(plan, machine) + HEADROOM_BYTES
    if not shape.num_experts or needed <= machine.host_bytes:
        return None
    return problem(
        budgets.memory_beyond_machine(
            flag=_flags(machine),
            headroom_bytes=HEADROOM_BYTES,
            needed_bytes=needed,
            whole_bytes=machine.host_bytes,
        )
    )


def _available(plan: BudgetPlan, machine: Machine, limits: Limits) -> Finding | None:
    taken = _taken_of_host(plan, machine)
    if limits.available_bytes is None or taken <= limits.available_bytes:
        return None
    return warning(
        budgets.memory_in_use(
            flag=_flags(machine), taken_bytes=taken, available_bytes=limits.available_bytes
        )
    )


def _on_disk(shape: ModelShape, plan: BudgetPlan, machine: Machine) -> Finding | None:
    if not shape.num_experts or plan.geometry is None:
        return None
    missing_bytes = (shape.all_experts - plan.geometry.num_frames) * plan.block_bytes
    cached_bytes = max(0, machine.host_bytes - _taken_of_host(plan, machine) - HEADROOM_BYTES)
    held_bytes = plan.host_bytes + (0 if machine.has_gpu else cached_bytes)
    if missing_bytes <= held_bytes:
        return None
    holder = "--host-memory" if machine.has_gpu else "the page cache"
    return warning(
        budgets.experts_on_disk(missing_bytes=missing_bytes, holder=holder, held_bytes=held_bytes)
    )


def _memlock(plan: BudgetPlan, machine: Machine, limits: Limits) -> Finding | None:
    if not machine.has_gpu or limits.memlock_bytes is None:
        return None
    if plan.host_bytes <= limits.memlock_bytes:
        return None
    return warning(
        budgets.memlock_too_low(host_bytes=plan.host_bytes, memlock_bytes=limits.memlock_bytes)
    )


def _address_space(
    shape: ModelShape, plan: BudgetPlan, machine: Machine, limits: Limits
) -> Finding | None:
    if limits.address_space_bytes is None:
        return None
    mapped = shape.dense_bytes + shape.all_expert_bytes + _taken_of_host(plan, machine)
    if mapped <= limits.address_space_bytes:
        return None
    return problem(
        budgets.address_space_too_low(mapped_bytes=mapped, address_bytes=limits.address_space_bytes)
    )
