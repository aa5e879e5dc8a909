"""SGLang's side of the scheduler: the sockets of its tokenizer manager and detokenizer, and what goes through them.

One of the files that know SGLang. Takes messages in and passes them to whoever understands them; sends results out.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from sglang.srt.environ import envs
from sglang.srt.managers import io_struct as io
from sglang.srt.runtime_context import get_serving
from sglang.srt.utils.network import get_zmq_socket

from sglmoe.config import EngineConfig
from sglmoe.errors import requests, sglang_words
from sglmoe.errors.user_error import UserError
from sglmoe.live_view.state import LiveState
from sglmoe.protocol import WorkerReady
from sglmoe.scheduler.finish import aborted, failed, is_our_fault
from sglmoe.scheduler.frontend_control import Control, startup_time
from sglmoe.scheduler.frontend_metrics import Metrics
from sglmoe.scheduler.frontend_output import abort_message, build_batch, is_due, take_delta
from sglmoe.scheduler.frontend_request import refused, translate
from sglmoe.scheduler.frontend_setup import load_text_side, scheduler_settings
from sglmoe.scheduler.live_state import LiveStates
from sglmoe.scheduler.report import Restarts, StepReport
from sglmoe.scheduler.request import Request
from sglmoe.scheduler.scheduler import Scheduler
from sglmoe.scheduler.seams import WorkerChannel

logger = logging.getLogger(__name__)


class Frontend:
    """Connects SGLang's processes with a `Scheduler`. Make it, `connect` it to a worker, then `run` it."""

    def __init__(self, *, server_args: Any, port_args: Any, config: EngineConfig) -> None:
        self._server_args = server_args
        self._port_args = port_args
        self._text = load_text_side(server_args)
        self._settings = scheduler_settings(config)
        self._decode = self._text.decode()
        self._force_interval = envs.SGLANG_FORCE_STREAM_INTERVAL.get()
        self._refusal: UserError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._health_checks: list[Any] = []  # answered with the worker's next sign of life

    def connect(self, worker: WorkerChannel, ready: WorkerReady) -> Scheduler:
        """Open the sockets and make the scheduler that serves them."""
        ports, context = self._port_args, zmq.asyncio.Context.instance()
        detokenizer = ports.detokenizer_ipc_name
        if get_serving().skip_tokenizer_init:
            detokenizer = ports.tokenizer_ipc_name
        self._requests = get_zmq_socket(context, zmq.PULL, ports.scheduler_input_ipc_name, False)
        self._rpc = get_zmq_socket(context, zmq.DEALER, ports.rpc_ipc_name, False)
        self._tokenizer = get_zmq_socket(context, zmq.PUSH, ports.tokenizer_ipc_name, False)
        # Connected, with no limit on what waits: sending does not wait, and there is no need for the loop to know.
        self._detokenizer = get_zmq_socket(zmq.Context.instance(), zmq.PUSH, detokenizer, False)
        self._rules = self._text.request_rules(ready.limits)
        self._scheduler = Scheduler(
            worker=worker,
            outputs=self,
            limits=ready.limits,
            snapshot=ready.snapshot,
            settings=self._settings,
            decode=self._decode,
            clock=time.perf_counter,
        )
        self._metrics = Metrics(
            server_args=self._server_args, port_args=ports, scheduler=self._scheduler
        )
        self._control = Control(
            scheduler=self._scheduler,
            metrics=self._metrics,
            ready=ready,
            to_detokenizer=self._to_detokenizer,
        )
        self._live_states = LiveStates(
            scheduler=self._scheduler,
            totals=self._metrics.totals,
            model=get_serving().served_model_name,
            clock=time.perf_counter,
        )
        return self._scheduler

    async def live_state(self) -> LiveState:
        """What people see who look now."""
        return await self._live_states.now(worker_pid=self._control.ready.pid)

    def ready_message(self, ready: WorkerReady) -> dict[str, Any]:
        """What SGLang's launcher waits for."""
        return {
            "status": "ready",
            "max_total_num_tokens": ready.limits.total_tokens,
            "max_req_input_len": self._rules.max_prompt_tokens,
            "page_size": ready.limits.page_tokens,  # for /server_info: SGLang's own side has 1
            "startup_time": startup_time(ready),
        }

    async def run(self) -> None:
        """Serve until SGLang says to shut down."""
        rpc = asyncio.create_task(self._serve_rpc())
        try:
            while True:
                try:
                    message = await io.async_sock_recv(self._requests)
                except msgspec.MsgspecError:
                    logger.exception("A message that is none")
                    continue
                if isinstance(message, io.ShutdownReq):
                    return
                await self._take(message)
        finally:
            for task in (rpc, *self._tasks):
                task.cancel()

    def refuse_all(self, reason: UserError) -> None:
        """From now on, every request is refused for this reason."""
        self._refusal = reason

    # ------------------------------------------------------------------------------------------------------------- inward

    async def _take(self, message: Any) -> None:
        match message:
            case io.TokenizedGenerateReqInput():
                await self._generate(message)
            case io.BatchTokenizedGenerateReqInput():
                for part in message.batch:
                    await self._generate(part)
            case io.TokenizedEmbeddingReqInput():
                await self._refuse(message, requests.embeddings())
            case io.BatchTokenizedEmbeddingReqInput():
                for part in message.batch:
                    await self._refuse(part, requests.embeddings())
            case _:
                self._answer_later(message)

    async def _generate(self, message: io.TokenizedGenerateReqInput) -> None:
        if self._refusal is not None:
            await self._refuse(message, self._refusal)
            return
        try:
            request = translate(message, self._rules)
        except ValueError as error:
            await self._refuse(message, sglang_words.as_sglang_says(error))
            return
        except Exception as error:  # ours; it must not end the others
            logger.exception("Request %s could not be read", message.rid)
            await self._refuse(message, requests.unreadable_request(why=repr(error)))
            return
        if request.display.is_health_check and await self._checks_health(message):
            return
        if request.priority is not None and self._refuses_priorities():
            self._scheduler.reject(request, aborted(sglang_words.PRIORITIES_OFF, 503))
            return
        self._scheduler.add(request)

    async def _checks_health(self, message: io.TokenizedGenerateReqInput) -> bool:
        """Whether the check needs no token of its own: the worker is about to show that it lives, or may rest."""
        if self._scheduler.awaits_worker:
            self._health_checks.append(message)
            return True
        if self._scheduler.paused and self._scheduler.roster.live:
            await self._to_tokenizer(io.HealthCheckOutput(), message)
            return True
        return False

    def _refuses_priorities(self) -> bool:
        return not self._settings.use_priority and self._server_args.abort_on_priority_when_disabled

    async def _refuse(self, message: Any, reason: UserError) -> None:
        request = refused(message)
        request.finish = failed(reason)
        logger.warning("Refused request %s: %s", request.rid, reason)
        await self.refuse([request])

    def _answer_later(self, message: Any) -> None:
        """Control messages may wait for the worker; requests behind them do not."""
        self._later(self._answer(message))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, message: Any) -> None:
        try:
            reply = await self._control.handle(message)
        except Exception:
            logger.exception("%s failed", type(message).__name__)
            return
        if reply is not None:
            await self._to_tokenizer(reply, message)

    async def _serve_rpc(self) -> None:
        while True:
            reply = await self._control.handle(await io.async_sock_recv(self._rpc))
            await io.async_sock_send(self._rpc, reply)

    # ------------------------------------------------------------------------------------------------------------ outward

    async def publish(self, requests: Sequence[Request]) -> None:
        """See `Outputs`."""
        due = [
            request
            for request in requests
            if is_due(request, decode=self._decode, force_interval=self._force_interval)
        ]
        if not due:
            return
        with_times = self._metrics.wants_times(due)
        for request in due:
            if not request.sent.started:
                self._metrics.first_output(request)
        deltas = [take_delta(request) for request in due]
        message = build_batch(
            deltas,
            weight_version=get_serving().weight_version,
            vocab_size=self._rules.limits.vocab_size,
            time_stats=self._metrics.time_stats if with_times else None,
        )
        await self._to_detokenizer(message)
        if not self._scheduler.roster.live:
            self._metrics.became_idle()

    async def refuse(self, requests: Sequence[Request]) -> None:
        """See `Outputs`."""
        for request in requests:
            # Any word counts as health there. A check that the worker died of is answered with silence.
            if not (request.display.is_health_check and is_our_fault(request.finish)):
                await self._to_tokenizer(abort_message(request))

    def step_done(self, report: StepReport) -> None:
        """See `Outputs`."""
        self._metrics.step_done(report)
        self._worker_lives()

    def worker_replaced(self, ready: WorkerReady, restarts: Restarts) -> None:
        """See `Outputs`."""
        self._rules = self._text.request_rules(ready.limits)
        self._control.ready = ready
        self._metrics.worker_replaced(restarts)
        self._worker_lives()

    def _worker_lives(self) -> None:
        checks, self._health_checks = self._health_checks, []
        for message in checks:
            self._later(self._to_tokenizer(io.HealthCheckOutput(), message))

    async def _to_tokenizer(self, message: Any, answered: Any = None) -> None:
        if answered is not None and message.http_worker_ipc is None:
            message.http_worker_ipc = answered.http_worker_ipc
        await io.async_sock_send(self._tokenizer, message)

    async def _to_detokenizer(self, message: Any) -> None:
        io.sock_send(self._detokenizer, message)
