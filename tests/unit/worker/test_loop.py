"""The worker's loop: plans whose steps follow each other, and all else between two steps.

Requests "a" and "b" decode (see `test_following_steps`); a step is over when the loop has looked `looks` times whether it is.
"""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from test_following_steps import A, B, FollowingBench
from test_worker import new_request

from sglmoe.protocol import AddRequests, CallDone, FlushCache, Shutdown
from sglmoe.worker import loop as loop_module
from sglmoe.worker.loop import Loop
from sglmoe.worker.request import WorkerRequest


class Plans:
    """What the scheduler has sent; None: nothing has come when the loop looks."""

    def __init__(self, messages: Sequence[Any], log: list[str]):
        self.messages = list(messages)
        self._log = log

    def receive(self, timeout_seconds: float | None = None) -> Any:
        message = self.messages.pop(0)
        if message is None and timeout_seconds is None:
            return self.receive()  # as long as it takes
        return message


class Grammars:
    has_pending_grammars = False

    def add(self, request: WorkerRequest) -> None:
        return None

    def ready_grammars(self) -> Iterator[tuple[str, str]]:
        return iter(())


class LoopBench(FollowingBench):
    def __init__(self) -> None:
        super().__init__()
        self.mark = SimpleNamespace(step_id=0)
        self.log = self.model.log  # what happens, in order
        self.looks = 1

    def run(self, *messages: Any) -> list[str]:
        """Until all messages are answered."""
        plans = Plans([*messages, Shutdown()], self.log)
        Loop(
            plans,  # type: ignore[arg-type]
            SimpleNamespace(send=self.sent),  # type: ignore[arg-type]
            self.mark,  # type: ignore[arg-type]
            self.worker,
            Grammars(),
            self.answer,
        ).run()
        assert plans.messages == []
        return self.log

    def sent(self, message: Any) -> None:
        told = "done" if isinstance(message, CallDone) else f"step {message.step_id}"
        self.log.append(f"send {told}")

    def answer(self, message: FlushCache) -> CallDone:
        self.log.append("answer")
        return CallDone(message.call_id, success=True)


FOLLOWED = "known, and followed"


def test_a_plan_that_has_come_begins_before_the_step_in_front_of_it_is_told() -> None:
    bench = LoopBench()
    first, second, third = (bench.plan(A, B) for _ in range(3))
    assert bench.run(first, second, None, third, None) == [
        "begin",
        *("begin", FOLLOWED, "send step 2"),
        *("begin", FOLLOWED, "send step 3"),
    ]


def test_a_step_that_is_over_is_told_though_no_plan_comes(monkeypatch: Any) -> None:
    bench = LoopBench()
    looks = iter([False, False, True])
    monkeypatch.setattr(
        "test_following_steps.Later.is_over", property(lambda _: next(looks)), raising=True
    )
    slept: list[float] = []
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(sleep=slept.append))
    assert bench.run(bench.plan(A, B), None, None) == ["begin", "known", "send step 2"]
    assert len(slept) == 2


def test_what_asks_for_memory_waits_for_the_step() -> None:
    bench = LoopBench()
    assert bench.run(bench.plan(A, B), FlushCache(1)) == [
        *("begin", "known", "send step 2"),
        *("answer", "send done"),
    ]


def test_requests_that_come_change_nothing_of_it() -> None:
    bench = LoopBench()
    first, second = bench.plan(A, B), bench.plan(A, B)
    added = AddRequests((new_request("c", range(30, 34)),))
    assert bench.run(first, added, second) == ["begin", "begin", FOLLOWED, "send step 2"]
    assert bench.worker._requests["c"].num_prompt == 4


def test_a_plan_that_cant_follow_begins_when_the_step_is_told() -> None:
    bench = LoopBench()
    first, second = bench.plan(A, B), bench.plan(A)
    assert bench.run(first, second) == ["begin", "known", "send step 2", "begin"]


def test_what_nothing_can_follow_is_told_at_once() -> None:
    bench = LoopBench()
    bench.model.may_be_followed = False
    assert bench.run(bench.plan(A, B)) == ["begin", "known", "send step 2"]


def test_the_step_that_is_blamed_is_the_last_that_began() -> None:
    bench = LoopBench()
    first, second = bench.plan(A, B), bench.plan(A, B)
    bench.run(first, second)
    assert bench.mark.step_id == second.step_id
