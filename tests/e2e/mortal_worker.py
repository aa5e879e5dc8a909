"""The worker, made to die of some requests, as it would of a bug that they hit, and to draw by seed on a CPU too.

What it says right before such a death is lost: on a busy machine that is so of half of all answers.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

from sglmoe.protocol import StepPlan, StepResult
from sglmoe.transport import Receiver, Sender
from sglmoe.worker import process
from sglmoe.worker.worker import RunningStep, Worker

PILL = 1021  # a token; with it in its prompt, a request is the worker's end


def run_mortal_worker(*arguments: Any) -> None:
    """As `run_worker`, which see."""
    begin, load_model = Worker.begin, process.load_model

    def mortal_begin(self: Worker, plan: StepPlan) -> RunningStep:
        served = [self._requests[row.rid] for row in plan.rows]
        if any(PILL in request.tokens[: request.num_prompt] for request in served):
            os.kill(os.getpid(), signal.SIGSEGV)
        let_go()
        return begin(self, plan)

    def load_model_that_heeds_seeds(*args: Any, **keywords: Any) -> Any:
        from sglang.srt.runtime_context import get_context

        loaded = load_model(*args, **keywords)
        # As a flag it would be refused: SGLang has batch-invariant kernels for accelerators only.
        # The sampler needs none of them.
        get_context().override("test", enable_deterministic_inference=True)
        return loaded

    let_go = hold_answers_back()
    Worker.begin = mortal_begin  # type: ignore[method-assign]
    process.load_model = load_model_that_heeds_seeds
    process.run_worker(*arguments)


def hold_answers_back() -> Callable[[], None]:
    """Until there is nothing to do, or what is returned is called."""
    held: list[tuple[Sender[Any], StepResult]] = []
    send, receive = Sender.send, Receiver.receive

    def let_go() -> None:
        while held:
            send(*held.pop(0))

    def send_later(self: Sender[Any], message: Any) -> None:
        if isinstance(message, StepResult):
            held.append((self, message))
        else:
            send(self, message)

    def receive_at_ease(self: Receiver[Any], timeout_seconds: float | None = None) -> Any:
        if not self._socket.poll(0):
            let_go()
        return receive(self, timeout_seconds)

    Sender.send, Receiver.receive = send_later, receive_at_ease  # type: ignore[method-assign]
    return let_go


def serve_with_mortal_workers() -> None:
    """To be called in the process of a server, before it starts."""
    from sglmoe import preparation
    from sglmoe.start_up import ChildEntry

    worker = ChildEntry("mortal_worker", "run_mortal_worker")
    preparation.scheduler_entry = lambda config, viewers: ChildEntry(
        "sglmoe.scheduler.process",
        "run_scheduler",
        config=config,
        run_worker=worker,
        viewers=viewers,
    )
