"""What steers the scheduler, beside what the worker finds out."""

import msgspec

from sglmoe.scheduler.policy import NewTokenRatio, PolicySettings


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

    def first_ratio(self) -> NewTokenRatio:
        return NewTokenRatio(
            initial=self.new_token_ratio,
            minimum=self.min_new_token_ratio,
            decay=self.new_token_ratio_decay,
        )
