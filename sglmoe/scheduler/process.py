"""The scheduler's process: starts workers, serves behind SGLang's front end, and leaves non-zero when that ends badly."""

import asyncio
import contextlib
import logging
import os
import sys
from functools import partial
from multiprocessing.connection import Connection
from socket import socket
from typing import TYPE_CHECKING, Any

from sglmoe.errors.requests import going_down
from sglmoe.scheduler.live_state import answer
from sglmoe.scheduler.seams import WorkerLost
from sglmoe.scheduler.worker_client import RunWorker, WorkerProcess
from sglmoe.scheduler.worker_line import WorkerLine

if TYPE_CHECKING:
    from sglmoe.scheduler.frontend import Frontend

logger = logging.getLogger(__name__)

# SGLang kills the whole server within a second of our exit; clients get their errors before that.
FAREWELL_SECONDS = 2.0


def run_scheduler(
    server_args: Any,
    port_args: Any,
    gpu_id: int,
    tp_rank: int,
    pp_rank: int,
    dp_rank: int | None,
    pipe_writer: "Connection[Any, Any]",
    *,
    config: Any,
    run_worker: RunWorker,
    viewers: socket | None = None,
    **display: Any,
) -> None:
    """SGLang's process target, once `config` and `run_worker` are bound.

    `config` is an `EngineConfig` whose defaults are filled in. Whoever is at the other end of `viewers` may ask for the
    state (`live_state.answer`): not by SGLang's sockets, whose every word counts as health. `display` are ranks that
    SGLang shows; there is only one. Ends the process: with status 1 when no worker can be had, and at once, because its
    launcher waits for that.
    """
    assert (tp_rank, pp_rank) == (0, 0), "one scheduler drives one device"
    worker = WorkerLine(
        partial(
            WorkerProcess.start,
            run_worker,
            server_args=server_args,
            config=config,
            gpu_id=gpu_id,
            nccl_port=port_args.nccl_port,
        )
    )
    status = 1
    try:
        # Here and not above, because importing SGLang takes 20 s, which the worker uses to start.
        from sglmoe.scheduler.frontend import Frontend
        from sglmoe.scheduler.frontend_setup import enter_process

        enter_process(server_args, gpu_id=gpu_id, dp_rank=dp_rank)
        frontend = Frontend(server_args=server_args, port_args=port_args, config=config)
        asyncio.run(_serve(frontend, worker, pipe_writer, viewers))
        status = 0
    except WorkerLost as lost:
        logger.error("%s", lost)
    except Exception:
        logger.exception("The scheduler failed")
    finally:
        worker.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


async def _serve(
    frontend: "Frontend",
    worker: WorkerLine,
    pipe_writer: "Connection[Any, Any]",
    viewers: socket | None,
) -> None:
    """Serve until SGLang asks to leave. Raises WorkerLost after every request got its error."""
    try:
        ready = await worker.connect()
        logger.info("Worker ready after %.1f s: %s", ready.load_seconds, ready.description)
        scheduler = frontend.connect(worker, ready)
        pipe_writer.send(frontend.ready_message(ready))
        receiving = asyncio.create_task(frontend.run())
        scheduling = asyncio.create_task(scheduler.run())
        showing = asyncio.create_task(answer(viewers, frontend.live_state)) if viewers else None
        await asyncio.wait({receiving, scheduling}, return_when=asyncio.FIRST_COMPLETED)
        if scheduling.done():
            await _say_farewell(frontend, scheduling, receiving)
        scheduling.cancel()
        if showing is not None:
            showing.cancel()
        receiving.result()
        await worker.shut_down()
    finally:
        worker.close()


async def _say_farewell(
    frontend: "Frontend", scheduling: "asyncio.Task[None]", receiving: "asyncio.Task[None]"
) -> None:
    """Refuse what still comes in for a moment, then raise what ended the scheduling."""
    with contextlib.suppress(TimeoutError):
        frontend.refuse_all(going_down(cause=str(scheduling.exception())))
        await asyncio.wait_for(receiving, FAREWELL_SECONDS)
    scheduling.result()
