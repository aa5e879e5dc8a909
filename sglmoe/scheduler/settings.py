"""What steers the scheduler, beside what the worker finds out."""

import msgspec

from sglmoe.scheduler.policy import PolicySettings


class SchedulerSettings(msgspec.Struct, frozen=True):
    """Everything about scheduling that does not come from the worker. Timeouts of None never fire."""

    policy: PolicySettings
    use_priority: bool = False
    low_values_first: bool = False
    max_queued: int | None = None
    waiting_timeout_seconds: float | None = None
    running_timeout_seconds: float | None = None
    watchdog_seconds: float | None = None
    new_token_ratio: float = 0.7  # SGLang's defaults
    min_new_token_ratio: float = 0.098
    new_token_ratio_decay: float = 0.001
