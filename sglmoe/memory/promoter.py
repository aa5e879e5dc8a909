"""Fills host memory with experts from the checkpoint, in the background, while the link is not wanted for others."""

import logging
import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sglmoe.memory.host_tier import HostTier, block_reader
from sglmoe.memory.link_gate import LinkGate
from sglmoe.memory.promotion import Mask, Promotion, plan_promotions
from sglmoe.memory.store import ExpertReadError, ExpertStore
from sglmoe.units import show_bytes

logger = logging.getLogger(__name__)

# Arbitrary, these three. A plan for 94 x 128 experts takes 2 ms, to read one of them likewise.
PLAN_PROMOTIONS = 16
REPLAN_SECONDS = 0.1
LOG_SECONDS = 10.0


class Promoter:
    """Plans and carries out promotions, in a thread of its own once `start` was called.

    `heat` and `residents` say how much the frames want each expert, float64
    `[num_layers, num_experts]`, and which are in frames. They are called in that thread.
    """

    def __init__(
        self,
        tier: HostTier,
        store: ExpertStore,
        gate: LinkGate,
        *,
        heat: Callable[[], npt.NDArray[np.float64]],
        residents: Callable[[], Mask],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._tier = tier
        self._store = store
        self._gate = gate
        self._heat = heat
        self._residents = residents
        self._progress = _Progress(tier, clock)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expert-promoter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop, in the middle of an expert if need be."""
        self._stopping.set()
        self._tier.demanded.set()
        self._thread.join()

    def promote_some(self, limit: int = PLAN_PROMOTIONS) -> int:
        """Plan once, at most so many, and carry it out; how many experts came in."""
        snapshot = self._tier.snapshot(heat=self._heat(), is_resident=self._residents())
        promotions = plan_promotions(snapshot, limit)
        return sum(self._promote(promotion) for promotion in promotions)

    def _promote(self, promotion: Promotion) -> bool:
        block = self._tier.begin(promotion)
        if block is None:
            return False
        layer, expert, target = promotion.layer, promotion.expert, self._tier.blocks[block]
        read = block_reader(self._tier, self._store)
        try:
            num_bytes = read(layer, expert, target, before_chunk=self._before_chunk)
        except ExpertReadError as error:
            logger.warning("not kept in host memory: %s", error)
            self._tier.abandon(block, unreadable=True)
            return False
        except BaseException:
            self._tier.abandon(block)
            raise
        self._tier.finish(block, num_bytes)
        return True

    def _before_chunk(self) -> None:
        self._gate.wait()
        if self._stopping.is_set():
            raise _Stopped

    def _run(self) -> None:
        try:
            while True:
                self._tier.demanded.clear()
                if self._stopping.is_set():  # after that: `close` sets both, this one first
                    return
                if self.promote_some():
                    self._progress.log()
                    continue
                self._progress.log(settled=True)
                self._tier.demanded.wait()  # without misses the same plan would come out
                self._stopping.wait(REPLAN_SECONDS)
        except _Stopped:
            pass
        except Exception:
            logger.exception("host memory is not filled any further; serving goes on")


class _Stopped(Exception):
    """The promoter is to leave."""


class _Progress:
    """A line now and then while experts come in."""

    def __init__(self, tier: HostTier, clock: Callable[[], float]):
        self._tier = tier
        self._clock = clock
        self._logged_at = clock()
        self._logged_bytes = 0

    def log(self, *, settled: bool = False) -> None:
        """Nothing, if there is nothing new, or if the last line was short ago and more will come."""
        counters = self._tier.counters()
        seconds = self._clock() - self._logged_at
        num_bytes = counters["host_promoted_bytes"] - self._logged_bytes
        if not num_bytes or (seconds < LOG_SECONDS and not (settled and not self._logged_bytes)):
            return
        logger.info(
            "host memory: %d of %d blocks hold an expert, %s read in the background in %.1f s",
            counters["host_blocks_filled"],
            counters["host_blocks"],
            show_bytes(num_bytes),
            seconds,
        )
        self._logged_at += seconds
        self._logged_bytes += num_bytes
