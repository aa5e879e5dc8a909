"""Who it is that workers die with: found by running the suspects one at a time.

A death proves little: the machine may be short of memory, and a batch dies together. Only what kills again and again,
alone and at the same place, is at fault. Knows nothing of plans.
"""

from collections.abc import Sequence

from sglmoe.scheduler.request import Request

# A worker that died with a request costs it nothing the first time: most deaths have other causes, and all go on together.
# After the second it is run alone, so that the third is its own doing: two innocent deaths at one place are rare, three rarer.
DEATHS_BEFORE_TRIAL = 2
DEATHS_BEFORE_FAILURE = 3


class Suspects:
    """Requests that workers have died with, since each got further than ever (`Request.reached`)."""

    def __init__(self) -> None:
        self.on_trial: Request | None = (
            None  # to be run with nobody beside it; None while all may run
        )
        self._accused: list[Request] = []

    def accuse(self, present: Sequence[Request]) -> Request | None:
        """A worker died while it was at work for these. The one that is at fault, as soon as that is certain."""
        for request in present:
            request.num_deaths += 1
            if request.num_deaths >= DEATHS_BEFORE_TRIAL and request not in self._accused:
                self._accused.append(request)
        if len(present) == 1 and present[0].num_deaths >= DEATHS_BEFORE_FAILURE:
            return present[0]
        return None

    def choose(self) -> Request | None:
        """Decide who is on trial: one after the other, until it gets further or ends. The one before, if another follows it."""
        self._accused = [
            request
            for request in self._accused
            if not request.finished and request.num_deaths >= DEATHS_BEFORE_TRIAL
        ]
        before, self.on_trial = self.on_trial, self._accused[0] if self._accused else None
        return before if self.on_trial not in (None, before) else None
