"""Plans in flight: what was promised to the worker, and what the next plan can therefore say.

Gathers the views that `policy.plan_step` decides on, and keeps the estimates that it needs. Does no I/O.
"""

import logging
from collections import deque
from collections.abc import Sequence

import msgspec

from sglmoe.protocol import Limits, MemorySnapshot, ResidencyPlan, StepPlan, StepResult
from sglmoe.scheduler.affinity import NUM_CONSIDERED, Waiting, admission_order
from sglmoe.scheduler.passes import Held, most_running
from sglmoe.scheduler.policy import (
    MAX_PREFIX_MATCHES,
    NUM_PROBES,
    Candidate,
    Memory,
    NewTokenRatio,
    PolicySettings,
    plan_step,
)
from sglmoe.scheduler.request import QUEUED, Request, State
from sglmoe.scheduler.roster import Roster

logger = logging.getLogger(__name__)

# One plan runs, the next one is with the worker already.
MAX_PLANS_IN_FLIGHT = 2


class InFlight(msgspec.Struct, frozen=True):
    """A plan that was sent, and the requests that its rows named then."""

    plan: StepPlan
    requests: dict[str, Request]


class HoldingBack:
    """For how long prompts have been held back, since the last pass over prompts; and in all."""

    def __init__(self) -> None:
        self.num_passes = 0  # that were held back for
        self.total_seconds = 0.0
        self._since: float | None = None
        self._last_at = 0.0
        self._num_held = 0
        self._request_seconds = 0.0

    def until(self, now: float) -> Held:
        if self._since is None:
            return Held()
        more = self._num_held * (now - self._last_at)
        return Held(now - self._since, self._request_seconds + more)

    def note(self, num_held: int, now: float) -> None:
        """A plan holds so many back, or none."""
        held = self.until(now)
        self._num_held, self._last_at = num_held, now
        self._request_seconds = held.request_seconds
        if num_held and self._since is None:
            self._since = now
        elif not num_held:
            self.num_passes += self._since is not None
            self.total_seconds += held.seconds
            self._since, self._request_seconds = None, 0.0


class Planner:
    """Makes plans for the requests of a roster. `snapshot` is the worker's last word on its memory."""

    def __init__(
        self,
        *,
        roster: Roster,
        limits: Limits,
        snapshot: MemorySnapshot,
        policy: PolicySettings,
        ratio: NewTokenRatio,
    ) -> None:
        self.ratio = ratio
        self._asked = policy
        self._roster = roster
        self.holding_back = HoldingBack()
        self.num_out_of_turn = (
            0  # requests that were admitted before earlier ones, for their company
        )
        self._plans: deque[InFlight] = deque()
        self._next_step_id = 0  # goes on from worker to worker
        self._to_drop: list[str] = []
        self._to_preempt: list[str] = []
        self._pages_at_rejection: int | None = None  # admit nothing until more are available
        self._after_pass = False  # the last plan with rows computes prompts and nothing else
        self.meet_worker(limits, snapshot)

    def meet_worker(self, limits: Limits, snapshot: MemorySnapshot) -> None:
        """Plan for a worker that can do this and was told nothing yet."""
        self.snapshot = snapshot
        max_running = min(self._asked.max_running, limits.max_running)
        self.policy = msgspec.structs.replace(self._asked, max_running=max_running)
        self._limited = limited(self.policy, snapshot)
        self._page_tokens = limits.page_tokens

    def lose_worker(self) -> None:
        """Nothing will be answered any more; all requests wait again."""
        self._roster.lose_worker(step_id=self._next_step_id)
        self._plans.clear()
        self._to_drop, self._to_preempt = [], []
        self._pages_at_rejection = None

    def at_work(self, last_begun: int) -> list[Request]:
        """The requests that the worker is computing: those of the step that it began last, or would have begun next."""
        for plan in self._plans:
            if plan.requests and plan.plan.step_id >= last_begun:
                return [request for request in plan.requests.values() if not request.finished]
        return []

    @property
    def oldest(self) -> StepPlan | None:
        """The plan whose answer is due next."""
        return self._plans[0].plan if self._plans else None

    @property
    def running_limit(self) -> int:
        """Requests that may run at once: what the flags and their targets allow, and the worker's memory plan."""
        return self._limited.max_running

    @property
    def settled(self) -> bool:
        """The worker has nothing to answer and nothing new to hear."""
        return not (self._plans or self._to_drop or self._to_preempt)

    def drop(self, request: Request) -> None:
        """Have the worker forget a finished request."""
        self._to_drop.append(request.rid)
        if request.rid in self._to_preempt:
            self._to_preempt.remove(request.rid)
        self._pages_at_rejection = None

    def preempt(self, request: Request) -> None:
        """Have the worker take a running request's memory; it queues again."""
        self._roster.evict(request, step_id=self._next_step_id)
        self._to_preempt.append(request.rid)

    def next_plan(
        self, *, now: float, paused: bool, alone: Request | None = None
    ) -> StepPlan | None:
        """The next plan, to be sent; None if the worker has enough or there is nothing to say. `alone` has nobody beside it."""
        if len(self._plans) >= MAX_PLANS_IN_FLIGHT:
            return None
        running, queued = self._roster.running, self._admissible()
        if alone is not None:
            running = [alone] if alone.state is State.RUNNING else []
            queued = [alone] if alone.state is State.QUEUED else []
        if paused:
            running, queued = [], ()
        plan, num_held, only_prompts = plan_step(
            step_id=self._next_step_id,
            running=[self._view(request) for request in running],
            queued=[
                self._view(request, request.probed_cached, waited_seconds(request, now))
                for request in queued
            ],
            memory=Memory(
                available_pages=self.snapshot.available_pages,
                page_tokens=self._page_tokens,
                new_token_ratio=self.ratio.current,
            ),
            settings=self._limited,
            drop=tuple(self._to_drop),
            preempt=tuple(self._to_preempt),
            costs=self.snapshot.costs,
            held=self.holding_back.until(now),
            after_pass=self._after_pass,
        )
        self.holding_back.note(num_held, now)
        if not (plan.rows or plan.drop or plan.preempt):
            return None
        if plan.rows:
            self._after_pass = only_prompts
        self._promise(plan, now)
        return plan

    def answer(self, result: StepResult) -> InFlight:
        """Take a step's answer off the list. Raises ValueError if it is not the one that is due."""
        if not self._plans or self._plans[0].plan.step_id != result.step_id:
            raise ValueError(f"the worker answered step {result.step_id}, which is not due")
        answered = self._plans.popleft()
        if result.snapshot.plan.running_limit != self.snapshot.plan.running_limit:
            log_limit(result.snapshot.plan)
        self.snapshot = result.snapshot
        self._limited = limited(self.policy, self.snapshot)
        for request in answered.requests.values():
            del request.in_flight[0]
        self._roster.left(answered.plan.drop)
        for rid, num_tokens in result.cached_tokens.items():
            if probed := self._roster.live.get(rid):
                probed.probed_cached = num_tokens
        return answered

    def reject(self, rejected: Sequence[Request], *, step_id: int) -> None:
        """Memory did not suffice for some requests of a step (or, with none, it did)."""
        available_pages = self.snapshot.available_pages
        if not rejected:
            self.ratio.sink()
            if self._pages_at_rejection is not None and available_pages > self._pages_at_rejection:
                self._pages_at_rejection = None
            return
        for request in rejected:
            self._roster.evict(request, step_id=step_id)
        running = self._roster.running
        self._pages_at_rejection = available_pages
        self.ratio.after_rejection(
            decoded_tokens=sum(len(request.output_ids) for request in running),
            allowed_tokens=sum(request.stop.max_new_tokens for request in running),
            num_running=len(running),
        )

    def _promise(self, plan: StepPlan, now: float) -> None:
        """Remember what a plan that is about to be sent will do."""
        for rid in plan.preempt[len(self._to_preempt) :]:
            self._roster.evict(self._roster.live[rid], step_id=plan.step_id)
        self._to_drop, self._to_preempt = [], []
        self._next_step_id += 1
        live, requests = self._roster.live, {}
        for row in plan.rows:
            request = requests[row.rid] = live[row.rid]
            request.in_flight.append(row.num_tokens)
            if request.state is QUEUED:
                request.timing.scheduled_at = request.timing.scheduled_at or now
                self._overtake(request)
                self._roster.start(request)
        self._plans.append(InFlight(plan, requests))

    def _admissible(self) -> Sequence[Request]:
        """The queue as far as a plan could take it, and a few more whose cached prefixes to ask for."""
        queue, room = self._roster.queue, self.running_limit - len(self._roster.running)
        if self.policy.preemption_threshold is not None:
            room = self.policy.max_running
        if room <= 0 or (self._pages_at_rejection is not None and self._roster.running):
            return ()
        in_order_of_arrival = self.policy.order == "fcfs" or (
            self.policy.order == "lpm" and len(queue) > MAX_PREFIX_MATCHES
        )
        if not in_order_of_arrival:
            return queue
        first = queue[: room + NUM_PROBES]
        return self._by_affinity(first, room) if self._has_affinity else first

    @property
    def _has_affinity(self) -> bool:
        """Whether it counts who runs together: only while passes have to load experts."""
        return self.policy.expert_affinity and self.snapshot.costs.stream_seconds > 0

    def _by_affinity(self, waiting: Sequence[Request], room: int) -> Sequence[Request]:
        """Those who are most like the running ones first. Nobody overtakes another priority."""
        if len(waiting) < 2:
            return waiting
        num_places = min(room, NUM_CONSIDERED)
        rank = self._roster.rank(waiting[0])
        num_peers = sum(self._roster.rank(request) == rank for request in waiting)
        num_peers = min(num_peers, num_places - 1 + NUM_CONSIDERED)  # nobody else can be picked
        order = admission_order(
            [Waiting(request.sketch, request.num_overtaken) for request in waiting[:num_peers]],
            [request.sketch for request in self._roster.running],
            num_places=num_places,
        )
        return [*(waiting[index] for index in order), *waiting[num_peers:]]

    def _overtake(self, request: Request) -> None:
        """It is admitted now: who waited before it, and waits on, was overtaken once more."""
        if not self.policy.expert_affinity:
            return
        queue = self._roster.queue
        overtaken = queue[: queue.index(request)]
        self.num_out_of_turn += bool(overtaken)
        for senior in overtaken:
            senior.num_overtaken += 1

    def _view(
        self, request: Request, cached_tokens: int | None = None, waited_seconds: float = 0.0
    ) -> Candidate:
        computed, total = request.expected_progress()
        allowed = request.stop.max_new_tokens or 1  # every request samples once
        return Candidate(  # hundreds for each plan: positions cost half of what names do
            request.rid,
            total,
            computed,
            allowed - total + request.num_prompt,
            request.num_computed,
            cached_tokens,
            0 if request.priority is None else self._roster.rank(request),
            request.arrival,
            waited_seconds,
        )


def waited_seconds(request: Request, now: float) -> float:
    """For its first token, since it came; 0 when it has that."""
    return 0.0 if request.output_ids else now - request.timing.queued_at


def limited(policy: PolicySettings, snapshot: MemorySnapshot) -> PolicySettings:
    """The policy that admits no more than the worker's plan and the target between tokens say. Those who run go on,
    whatever these say."""
    most = min(policy.max_running, most_running(snapshot.costs, policy.passes))
    if snapshot.plan.running_limit is not None:
        most = min(most, snapshot.plan.running_limit)
    max_running = max(1, most)
    if max_running == policy.max_running:
        return policy
    return msgspec.structs.replace(policy, max_running=max_running)


def log_limit(plan: ResidencyPlan) -> None:
    limit = "no limit" if plan.running_limit is None else f"at most {plan.running_limit} running"
    logger.info("Memory plan: %s. %s", limit, plan.reason)
