"""Answers to everything SGLang may ask of a scheduler beside generating: each must be answered, or its endpoint hangs.

One of the files that know SGLang. What this server does not do is answered with success=False and the reason, where the
answer has room for one.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec
from sglang.srt.environ import envs
from sglang.srt.managers import io_struct as io
from sglang.srt.mem_cache.hicache_storage import disabled_l3_layout
from sglang.srt.runtime_context import get_context
from sglang.srt.utils import freeze_gc
from sglang.srt.utils.msgspec_utils import msgspec_to_builtins

from sglmoe.errors import requests, sglang_words
from sglmoe.protocol import CallDone, Profile, RecordRouting, WorkerReady
from sglmoe.scheduler.finish import aborted
from sglmoe.scheduler.frontend_metrics import Metrics
from sglmoe.scheduler.request import Request
from sglmoe.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

Reply = Any  # one of SGLang's messages, or None
Handler = Callable[[Any], Awaitable[Reply]]

WEIGHTS = str(requests.weights_stay())
HICACHE = str(requests.no_hierarchical_cache())
LORA = str(requests.no_adapters())
CORPUS = str(requests.no_corpus())
PARALLEL = str(requests.one_device())
DUMPER = str(requests.no_dumper())

RECORD_ACTIONS: dict[io.ExpertDistributionReqType, Literal["start", "stop", "dump"]] = {
    io.ExpertDistributionReqType.START_RECORD: "start",
    io.ExpertDistributionReqType.STOP_RECORD: "stop",
    io.ExpertDistributionReqType.DUMP_RECORD: "dump",
}

# What is refused, and how.
REFUSALS: dict[type[Any], Callable[[Any], Reply]] = {
    io.UpdateWeightFromDiskReqInput: lambda _: io.UpdateWeightFromDiskReqOutput(
        success=False, message=WEIGHTS
    ),
    io.UpdateWeightsFromDistributedReqInput: lambda _: io.UpdateWeightsFromDistributedReqOutput(
        success=False, message=WEIGHTS
    ),
    io.UpdateWeightsFromTensorReqInput: lambda _: io.UpdateWeightsFromTensorReqOutput(
        success=False, message=WEIGHTS
    ),
    io.UpdateWeightsFromIPCReqInput: lambda _: io.UpdateWeightsFromIPCReqOutput(
        success=False, message=WEIGHTS
    ),
    io.InitWeightsUpdateGroupReqInput: lambda _: io.InitWeightsUpdateGroupReqOutput(
        success=False, message=WEIGHTS
    ),
    io.DestroyWeightsUpdateGroupReqInput: lambda _: io.DestroyWeightsUpdateGroupReqOutput(
        success=False, message=WEIGHTS
    ),
    io.InitWeightsSendGroupForRemoteInstanceReqInput: (
        lambda _: io.InitWeightsSendGroupForRemoteInstanceReqOutput(success=False, message=WEIGHTS)
    ),
    io.SendWeightsToRemoteInstanceReqInput: lambda _: io.SendWeightsToRemoteInstanceReqOutput(
        success=False, message=WEIGHTS
    ),
    io.BeginWeightUpdateReqInput: lambda _: io.BeginWeightUpdateReqOutput(
        success=False, message=WEIGHTS
    ),
    io.EndWeightUpdateReqInput: lambda _: io.EndWeightUpdateReqOutput(
        success=False, message=WEIGHTS
    ),
    io.GetWeightsByNameReqInput: lambda _: io.GetWeightsByNameReqOutput(parameter=None),
    io.CheckWeightsReqInput: lambda _: io.CheckWeightsReqOutput(
        success=False, message=str(requests.no_weight_checks())
    ),
    io.ReleaseMemoryOccupationReqInput: lambda _: io.ReleaseMemoryOccupationReqOutput(),
    io.ResumeMemoryOccupationReqInput: lambda _: io.ResumeMemoryOccupationReqOutput(),
    io.SlowDownReqInput: lambda _: io.SlowDownReqOutput(),
    io.LoadLoRAAdapterReqInput: lambda _: io.LoRAUpdateOutput(success=False, error_message=LORA),
    io.LoadLoRAAdapterFromTensorsReqInput: lambda _: io.LoRAUpdateOutput(
        success=False, error_message=LORA
    ),
    io.UnloadLoRAAdapterReqInput: lambda _: io.LoRAUpdateOutput(success=False, error_message=LORA),
    io.OpenSessionReqInput: lambda message: io.OpenSessionReqOutput(
        session_id=message.session_id, success=False
    ),
    io.CloseSessionReqInput: lambda _: None,
    io.ClearHiCacheReqInput: lambda _: io.ClearHiCacheReqOutput(success=False),
    io.AttachHiCacheStorageReqInput: lambda _: io.AttachHiCacheStorageReqOutput(
        success=False, message=HICACHE
    ),
    io.DetachHiCacheStorageReqInput: lambda _: io.DetachHiCacheStorageReqOutput(
        success=False, message=HICACHE
    ),
    io.GetHiCacheL3LayoutReq: lambda _: io.GetHiCacheL3LayoutReqOutput(
        layout=msgspec_to_builtins(disabled_l3_layout(HICACHE))
    ),
    io.AddExternalCorpusReqInput: lambda _: io.AddExternalCorpusReqOutput(
        success=False, message=CORPUS
    ),
    io.RemoveExternalCorpusReqInput: lambda _: io.RemoveExternalCorpusReqOutput(
        success=False, message=CORPUS
    ),
    io.ListExternalCorporaReqInput: lambda _: io.ListExternalCorporaReqOutput(
        success=False, message=CORPUS
    ),
    io.ScaleElasticEPReqInput: lambda _: io.ScaleElasticEPReqOutput(
        success=False, message=PARALLEL
    ),
    io.PdRoleSwitchReqInput: lambda _: io.PdRoleSwitchReqOutput(success=False, message=PARALLEL),
    io.DumperControlReqInput: lambda _: io.DumperControlReqOutput(
        success=False, response=[], error=DUMPER
    ),
    io.RpcReqInput: lambda message: io.RpcReqOutput(
        success=False, message=str(requests.no_such_call(method=message.method))
    ),
    # Notices among SGLang's own processes, of no interest here.
    io.ActiveRanksOutput: lambda _: None,
    io.ElasticScaleUpdateReq: lambda _: None,
    io.BlockReqInput: lambda _: None,
    io.EncoderDispatchErrorReq: lambda _: None,
}


class Control:
    """Handles every message that is not a request to generate; `handlers` maps types of messages."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        metrics: Metrics,
        ready: WorkerReady,
        to_detokenizer: Callable[[Any], Awaitable[None]],
    ) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self.ready = ready  # of the worker that serves now
        self._to_detokenizer = to_detokenizer
        self.last_recording: dict[str, Any] | None = None
        self.handlers: dict[type[Any], Handler] = {
            **dict.fromkeys(REFUSALS, refuse),
            io.AbortReq: self._abort,
            io.FlushCacheReqInput: self._flush_cache,
            io.PauseGenerationReqInput: self._pause,
            io.ContinueGenerationReqInput: self._continue,
            io.GetInternalStateReq: self._get_state,
            io.SetInternalStateReq: self._set_state,
            io.UpdateWeightVersionReqInput: self._set_weight_version,
            io.ProfileReq: self._profile,
            io.ExpertDistributionReq: self._record_routing,
            io.FreezeGCReq: self._freeze_gc,
            io.ConfigureLoggingReq: self._configure_logging,
        }

    async def handle(self, message: Any) -> Reply:
        """The reply to a message, None if it wants none."""
        handler = self.handlers.get(type(message))
        if handler is None:
            logger.warning("No answer to %s", type(message).__name__)
            return None
        return await handler(message)

    async def _abort(self, message: io.AbortReq) -> None:
        def matches(request: Request) -> bool:
            return message.abort_all or request.rid.startswith(message.rid)

        if message.abort_message:
            self._scheduler.abort(matches, aborted(message.abort_message, 503))
        else:
            self._scheduler.abort(matches, aborted(sglang_words.ABORTED))

    async def _flush_cache(self, message: io.FlushCacheReqInput) -> Reply:
        done = await self._scheduler.flush_cache(timeout_seconds=message.timeout_s or 0.0)
        logger.info("Cache %s %s", "flushed" if done.success else "not flushed:", done.message)
        return io.FlushCacheReqOutput(success=done.success, message=done.message)

    async def _pause(self, message: io.PauseGenerationReqInput) -> None:
        if message.mode == "abort":
            self._scheduler.abort(lambda request: True, aborted(sglang_words.ABORTED))
        self._scheduler.pause(retract=message.mode == "retract")

    async def _continue(self, message: io.ContinueGenerationReqInput) -> None:
        self._scheduler.resume()

    async def _get_state(self, message: io.GetInternalStateReq) -> Reply:
        state = get_context().resolved_server_args_dict()
        state.pop("custom_sigquit_handler", None)
        state |= internal_state(self._scheduler, self._metrics, self.ready)
        state["sglmoe"]["recording"] = self.last_recording
        return io.GetInternalStateReqOutput(internal_state=msgspec_to_builtins(state))

    async def _set_state(self, message: io.SetInternalStateReq) -> Reply:
        logger.warning("%s cannot be changed while the server runs", sorted(message.server_args))
        return io.SetInternalStateReqOutput(updated=False)

    async def _set_weight_version(self, message: io.UpdateWeightVersionReqInput) -> Reply:
        get_context().override("scheduler.weight_version", weight_version=message.new_version)
        return io.UpdateWeightVersionReqOutput()

    async def _profile(self, message: io.ProfileReq) -> Reply:
        start = message.req_type is io.ProfileReqType.START_PROFILE
        if start and (message.num_steps or message.profile_by_stage or message.start_step):
            return io.ProfileReqOutput(success=False, message=str(requests.profile_by_hand()))
        done = await self._scheduler.ask_worker(
            Profile(
                call_id=-1,
                output_dir=(message.output_dir or "/tmp") if start else None,
                activities=tuple(message.activities or ()),
                with_stack=bool(message.with_stack),
                record_shapes=bool(message.record_shapes),
                name=message.profile_prefix or message.profile_id or "",
            )
        )
        return io.ProfileReqOutput(success=done.success, message=done.message)

    async def _record_routing(self, message: io.ExpertDistributionReq) -> Reply:
        action = RECORD_ACTIONS[message.action]
        directory = envs.SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR.get()
        # A recording begins with an empty memory: the last request must have given its own back.
        done = CallDone(-1, success=True)
        if action == "start":
            done = await self._scheduler.flush_cache()
        if done.success:
            done = await self._scheduler.ask_worker(RecordRouting(-1, action, directory))
        log = logger.info if done.success else logger.warning
        log("Routing trace, %s: %s", action, done.message)
        self.last_recording = {"action": action, "success": done.success, "message": done.message}
        # The answer has no room for any of this: /server_info shows it.
        return io.ExpertDistributionReqOutput()

    async def _freeze_gc(self, message: io.FreezeGCReq) -> None:
        freeze_gc("Scheduler", message.gc_threshold)
        await self._to_detokenizer(message)

    async def _configure_logging(self, message: io.ConfigureLoggingReq) -> None:
        if message.log_level is not None:
            logging.getLogger().setLevel(message.log_level.upper())
        await self._to_detokenizer(message)


async def refuse(message: Any) -> Reply:
    """Say no, and why where the answer has room."""
    reply = REFUSALS[type(message)](message)
    if reply is not None:
        logger.warning("Refused %s: %s", type(message).__name__, reply)
    return reply


def internal_state(scheduler: Scheduler, metrics: Metrics, ready: WorkerReady) -> dict[str, Any]:
    """What /server_info shows beside the flags: SGLang's keys, and ours under "sglmoe"."""
    snapshot, roster = scheduler.planner.snapshot, scheduler.roster
    memory = msgspec.structs.asdict(snapshot)
    plan = msgspec.structs.asdict(memory.pop("plan"))
    prefetch = msgspec.structs.asdict(memory.pop("prefetch"))
    costs = msgspec.structs.asdict(memory.pop("costs"))
    packed = msgspec.structs.asdict(memory.pop("packed"))
    arena_gib = snapshot.num_frames * snapshot.frame_bytes / 2**30
    return {
        "world_size": 1,
        "startup_time": startup_time(ready),
        "effective_max_running_requests_per_dp": scheduler.planner.policy.max_running,
        "last_gen_throughput": metrics.gen_throughput,
        "memory_usage": {
            "kvcache": round(snapshot.kv_frames * snapshot.frame_bytes / 2**30, 3),
            "arena": round(arena_gib, 3),
            "token_capacity": scheduler.limits.total_tokens,
            "token_capacity_swa": None,
            "graph": {},
        },
        "sglmoe": {
            "memory": memory,
            "plan": plan,
            "costs": costs,
            "prefetch": prefetch,
            "packed": packed,
            "running_limit": scheduler.planner.running_limit,
            "admitted_out_of_turn": scheduler.planner.num_out_of_turn,
            "held_passes": scheduler.planner.holding_back.num_passes,
            "limits": msgspec.structs.asdict(scheduler.limits),
            "totals": msgspec.structs.asdict(metrics.totals),
            "running_requests": len(roster.running),
            "queued_requests": len(roster.queue),
            "preparing_requests": roster.num_preparing,
            "paused": scheduler.paused,
            "new_token_ratio": scheduler.planner.ratio.current,
            "restarts": msgspec.structs.asdict(scheduler.recovery.restarts),
            "replacing_worker": scheduler.recovery.is_under_way,
            "worker": ready.description,
            "worker_pid": ready.pid,
        },
    }


def startup_time(ready: WorkerReady) -> dict[str, Any]:
    """SGLang's breakdown of the start, as far as it exists here."""
    return {
        "load_weight": ready.load_seconds,
        "kv_cache_allocation": 0.0,
        "scheduler_e2e": ready.load_seconds,
        "cuda_graph": {},
    }
