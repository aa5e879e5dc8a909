"""torch.profiler around the worker's steps, started and stopped by message."""

import time
from pathlib import Path
from typing import Any

import torch

from sglmoe.errors import requests
from sglmoe.protocol import Profile

ACTIVITIES = {
    "CPU": torch.profiler.ProfilerActivity.CPU,
    "GPU": torch.profiler.ProfilerActivity.CUDA,
}


class Profiler:
    """At most one running profile."""

    def __init__(self) -> None:
        self._running: Any = None
        self._path = Path()

    def handle(self, message: Profile) -> tuple[bool, str]:
        """Start or stop; whether that was possible, and where the trace is or why not."""
        return self._stop() if message.output_dir is None else self._start(message)

    def _start(self, message: Profile) -> tuple[bool, str]:
        if self._running is not None:
            return False, str(requests.profile_running())
        unknown = set(message.activities) - set(ACTIVITIES)
        if unknown:
            why = requests.unknown_activities(given=sorted(unknown), known=sorted(ACTIVITIES))
            return False, str(why)
        directory = Path(message.output_dir or ".")
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"{message.name or time.time()}-worker.trace.json.gz"
        self._running = torch.profiler.profile(
            activities=[ACTIVITIES[name] for name in message.activities or ("CPU",)],
            with_stack=message.with_stack,
            record_shapes=message.record_shapes,
        )
        self._running.start()
        return True, f"profiling into {self._path}"

    def _stop(self) -> tuple[bool, str]:
        if self._running is None:
            return False, str(requests.no_profile())
        self._running.stop()
        self._running.export_chrome_trace(str(self._path))
        self._running = None
        return True, f"the trace is in {self._path}"
