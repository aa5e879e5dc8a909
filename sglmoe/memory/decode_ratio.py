"""What decoding a packed expert from the arena takes, beside what bringing one from below takes."""

import threading

from sglmoe.memory.step_times import LOAD_HALF_LIFE, DecayedRatio


class DecodeRatio:
    """Both are measured where they happen, in threads that copy; whoever wants to know asks, in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._decoded = DecayedRatio(LOAD_HALF_LIFE)
        self._loaded = DecayedRatio(LOAD_HALF_LIFE)

    def note(self, seconds: float, *, is_decoded: bool) -> None:
        """An expert was decoded in so many seconds, or else loaded."""
        with self._lock:
            (self._decoded if is_decoded else self._loaded).note(seconds, 1)

    def __call__(self) -> float:
        """0 to 1; 1, with which nothing is worth packing, until both have been measured."""
        with self._lock:
            decoded, loaded = self._decoded.ratio, self._loaded.ratio
        return 1.0 if not decoded or not loaded else min(decoded / loaded, 1.0)
