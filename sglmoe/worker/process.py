"""The worker process: load, then answer the scheduler's messages (`loop.py`) until it says to leave.

Owns the process and its two sockets. Any failure becomes a last message, so that the scheduler can name it.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import zmq

from sglmoe.config import EngineConfig, MemoryPolicy, PrefetchMode
from sglmoe.memory.experts import ABSENT
from sglmoe.memory.step_times import StepTimes
from sglmoe.memory.use_counter import UseCounter
from sglmoe.prediction.predictor import ModelParts
from sglmoe.predictor.listener import SentEmbeddings
from sglmoe.predictor.process import start_predictor
from sglmoe.protocol import (
    PROTOCOL_VERSION,
    CallDone,
    FlushCache,
    FromWorker,
    Limits,
    MemoryMap,
    Profile,
    RecordRouting,
    ShowMemory,
    ToWorker,
    WorkerCall,
    WorkerFailed,
    WorkerProgress,
    WorkerReady,
)
from sglmoe.step_mark import StepMark
from sglmoe.transport import Receiver, Sender, plans_address, results_address
from sglmoe.units import show_bytes
from sglmoe.worker.loop import Loop
from sglmoe.worker.model_runner import ModelRunner
from sglmoe.worker.model_runner_loading import Loaded, load_model, start_process
from sglmoe.worker.model_runner_routers import embedding_of, read_router
from sglmoe.worker.packed_planner import PackedPlanner
from sglmoe.worker.predictors import Sources, make_advisor
from sglmoe.worker.prefetching import Prefetching
from sglmoe.worker.profiler import Profiler
from sglmoe.worker.recorder import Recorder, Recording
from sglmoe.worker.residency_planner import ResidencyPlanner
from sglmoe.worker.step_watch import Price, StepWatch
from sglmoe.worker.worker import Worker

logger = logging.getLogger(__name__)


def run_worker(
    server_args: Any,
    config: Any,
    gpu_id: int,
    nccl_port: int,
    socket_directory: str,
    step_mark: StepMark,
) -> None:
    """The process's target. `config` is an `EngineConfig` whose defaults are filled in."""
    context: zmq.Context[Any] = zmq.Context()
    directory = Path(socket_directory)
    sender: Sender[FromWorker] = Sender(context, results_address(directory), bind=False)
    plans: Receiver[ToWorker] = Receiver(context, plans_address(directory), ToWorker, bind=False)
    try:
        start_process(server_args, gpu_id, process_name="WORKER")
        loaded = load_model(
            server_args,
            gpu_id=gpu_id,
            nccl_port=nccl_port,
            config=config,
            on_progress=lambda *stage: sender.send(WorkerProgress(*stage)),
        )
        model = ModelRunner(loaded, server_args)
        worker, recording = make_worker(loaded, model, config, server_args.model_path)
        loop = Loop(
            plans,
            sender,
            step_mark,
            worker,
            model,
            Calls(worker, recording, drawing=lambda: draw(loaded)).answer,
        )
        sender.send(ready_message(loaded, model))
        loop.run()
        status = 0
    except ValueError as error:  # says itself what to change
        logger.error("%s", error)
        sender.send(WorkerFailed(str(error)))
        status = 1
    except Exception:
        logger.exception("the worker failed")
        sender.send(WorkerFailed(traceback.format_exc()))
        status = 1
    plans.close()
    sender.close()
    context.term()  # waits, within the sockets' linger, for the last message to leave
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # copy threads and grammar compilers must not hold the process


def make_worker(
    loaded: Loaded, model: ModelRunner, config: EngineConfig, model_path: str
) -> tuple[Worker, Recording]:
    """What answers plans, and what records their routing. Raises ValueError for a predictor that does not exist or fit."""
    times = StepTimes()  # no overlap: experts travel while their layer waits, on a GPU too
    prefetching = model.prefetching = start_prefetching(
        loaded, config, times, model_folder=Path(model_path)
    )
    packed = packed_planner(loaded, times)
    worker = Worker(
        memory=loaded.memory,
        model=model,
        max_running=loaded.max_running,
        watch=step_watch(loaded, times),
        planner=residency_planner(loaded, config, times),
        prefetching=prefetching,
        packed=packed,
    )
    recording = Recording(
        worker,
        model,
        lambda: new_recorder(loaded, model_path),
        loaded.memory,
        pause=[its.pause for its in (prefetching, packed) if its is not None],
    )
    return worker, recording


def draw(loaded: Loaded) -> MemoryMap:
    return loaded.memory.draw(loaded.tier.held())


def first_price(loaded: Loaded) -> Price:
    prices = loaded.memory.prices
    return Price(prices.expert_nanoseconds, prices.token_nanoseconds)


def num_experts(loaded: Loaded) -> int:
    """Of all layers; 0 where none is paged."""
    experts = loaded.experts
    return len(experts.layer_ids) * experts.shape.num_experts if experts.shape else 0


def step_watch(loaded: Loaded, times: StepTimes) -> StepWatch:
    return StepWatch(
        times,
        first_price(loaded),
        num_experts=num_experts(loaded),
        decode_ratio=loaded.packing.decode_ratio,
    )


def residency_planner(
    loaded: Loaded, config: EngineConfig, times: StepTimes
) -> ResidencyPlanner | None:
    """None where there is nothing to plan: by the operator's wish, without experts, or where they have a fixed share."""
    experts = loaded.experts
    fixed = config.memory_policy is MemoryPolicy.STATIC
    if not config.memory_planner or fixed or experts.shape is None:
        return None
    uses = UseCounter(len(experts.layer_ids), experts.shape.num_experts)
    experts.counters.append(uses)
    return ResidencyPlanner(
        times=times,
        uses=uses,
        geometry=loaded.geometry,
        floor_frames=loaded.floor_frames,
        max_running=loaded.max_running,
    )


def packed_planner(loaded: Loaded, times: StepTimes) -> PackedPlanner | None:
    """None where no frame is to hold packed experts."""
    experts = loaded.experts
    if not loaded.packing.expert_bytes or experts.shape is None:
        return None
    uses = UseCounter(len(experts.layer_ids), experts.shape.num_experts)
    experts.counters.append(uses)
    return PackedPlanner(
        loaded.memory,
        loaded.packing,
        times=times,
        uses=uses,
        frame_bytes=loaded.geometry.frame_bytes,
        floor_frames=loaded.floor_frames,
    )


def start_prefetching(
    loaded: Loaded,
    config: EngineConfig,
    times: StepTimes,
    *,
    model_folder: Path,
) -> Prefetching | None:
    """None where nothing is to be predicted. Raises ValueError for a predictor that does not exist or fit."""
    experts = loaded.experts
    if config.expert_prefetch is PrefetchMode.OFF or experts.shape is None:
        return None
    model = loaded.runner.model
    embeddings = SentEmbeddings(experts.shape.hidden)
    parts = ModelParts(
        num_layers=len(experts.layer_ids),
        num_experts=experts.shape.num_experts,
        top_k=loaded.top_k,
        embed=embeddings,
    )
    sources = Sources(
        parts=parts,
        router=read_router(model, experts.layer_ids),
        vocab_size=loaded.runner.model_config.vocab_size,
        folder=model_folder,
    )
    frame_table = np.full_like(loaded.memory.frame_table, ABSENT)  # the predictor's own
    advisor = make_advisor(config.expert_predictor, sources, frame_table=frame_table)
    prefetching = experts.observer = Prefetching(
        loaded.memory,
        start_predictor(advisor, frame_table, embeddings),
        mode=config.expert_prefetch,
        times=times,
        first_load_seconds=loaded.memory.prices.expert_nanoseconds / 1e9,
        embed=embedding_of(model),
    )
    return prefetching


def new_recorder(loaded: Loaded, model_path: str) -> Recorder:
    return Recorder(
        loaded.memory,
        model=Path(model_path).name,
        geometry=loaded.geometry,
        floor_frames=loaded.floor_frames,
    )


def ready_message(loaded: Loaded, model: ModelRunner) -> WorkerReady:
    snapshot = loaded.memory.snapshot(0)
    tokens = snapshot.total_pages * snapshot.page_tokens
    expert_bytes = loaded.experts.store.total_bytes
    return WorkerReady(
        protocol_version=PROTOCOL_VERSION,
        limits=Limits(
            total_tokens=tokens,
            page_tokens=snapshot.page_tokens,
            max_running=loaded.max_running,
            context_tokens=loaded.context_tokens,
            vocab_size=model.vocab_size,
            dense_bytes=loaded.dense_bytes,
            arena_bytes=loaded.arena_bytes,
            expert_bytes=expert_bytes,
            floor_frames=loaded.floor_frames,
            graph_bytes=loaded.graphs.reserved_bytes,
        ),
        snapshot=snapshot,
        load_seconds=loaded.load_seconds,
        pid=os.getpid(),
        description=(
            f"dense weights {show_bytes(loaded.dense_bytes)}, arena {show_bytes(loaded.arena_bytes)} "
            f"in {snapshot.num_frames} frames of {show_bytes(snapshot.frame_bytes)}; experts "
            f"{show_bytes(expert_bytes)} in the checkpoint, host memory for {snapshot.host_blocks} of "
            f"them; KV of up to {tokens} tokens in pages of {snapshot.page_tokens}"
        ),
    )


class Calls:
    """Answers what the scheduler asks for between two steps."""

    def __init__(self, worker: Worker, recording: Recording, *, drawing: Callable[[], MemoryMap]):
        self._worker = worker
        self._profiler = Profiler()
        self._recording = recording
        self._drawing = drawing

    def answer(self, message: WorkerCall) -> CallDone:
        match message:
            case FlushCache():
                self._worker.flush_cache()
                return CallDone(message.call_id, success=True)
            case Profile():
                return CallDone(message.call_id, *self._profiler.handle(message))
            case RecordRouting():
                return CallDone(message.call_id, *self._recording.handle(message))
            case ShowMemory():
                return CallDone(message.call_id, success=True, memory=self._drawing())
            case _:
                assert_never(message)
