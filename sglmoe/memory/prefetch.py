"""Experts on their way into frames while layers compute: what is wanted, and who brings it."""

from typing import Protocol

import msgspec

from sglmoe.memory.experts import Load


class Wanted(msgspec.Struct, frozen=True, gc=False):
    """An expert that a layer ahead is likely to ask for in this step."""

    layer: int
    expert: int
    probability: float


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """A load that is over."""

    load: Load
    is_there: bool  # False: it failed, and the frame's bytes mean nothing


class BackgroundLoader(Protocol):
    """Moves experts at lower priority than demand loads: those wait for a chunk of it at most.

    Each load that was begun ends once: in `finished`, by `cancel`, or, once promoted, by `wait`. Main
    thread only.
    """

    def begin(self, load: Load) -> None:
        """Queue the load behind those that were begun before it."""

    def finished(self) -> list[Arrival]:
        """Those that have ended since this was last asked."""

    def promote(self, load: Load) -> None:
        """From now on it has the priority of a demand load, and is not among `finished`."""

    def wait(self, load: Load) -> bool:
        """Until one that was promoted has ended; whether its bytes are there."""

    def cancel(self, load: Load) -> None:
        """Return when no byte of it will be written any more."""
