"""What memory is told before it serves."""

import logging
from itertools import count

import pytest
import torch
from prefetched_memory import Memory

from sglmoe.worker.owned_memory import measure_link


class Timer:
    """Each is recorded 2 ms after the one before."""

    clock = count(0, 2)

    def record(self) -> None:
        self.at = next(self.clock)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Timer") -> float:
        return end.at - self.at


def test_an_expert_costs_what_the_link_takes_for_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    memory = Memory()
    token_nanoseconds = memory.prices.token_nanoseconds
    frame, block = torch.zeros(100, dtype=torch.uint8), torch.ones(90, dtype=torch.uint8)
    measure_link(memory, frame, block, Timer)
    assert memory.prices.expert_nanoseconds == 2_000_000
    assert memory.prices.token_nanoseconds == token_nanoseconds
    assert caplog.messages == ["host memory to device: 43.95 KiB a second"]
