"""Getting a model ready: sglang loads the dense weights, and the rest of the budget becomes one arena for KV and experts.

One of the files that know sglang.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import setproctitle
import torch

from sglmoe.config import DEFAULT_MAX_RUNNING, EngineConfig
from sglmoe.decode_graphs import DecodeGraphs
from sglmoe.errors.budgets import experts_held_beside_budget
from sglmoe.memory.arena import CPU_INNER_MULTIPLE, Geometry, arena_bytes_within, plan_floor
from sglmoe.memory.host_tier import HostTier
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.packed_order import Packing
from sglmoe.memory.read_rate import READ_RATE, ReadRate
from sglmoe.memory.staging import decoding_bytes
from sglmoe.memory.store import ExpertStore
from sglmoe.supported_models import refused_layers
from sglmoe.units import parse_bytes
from sglmoe.worker.captured_steps import CapturedSteps, captured_steps
from sglmoe.worker.model_runner_graphs import capture_graphs, plan_decode_graphs
from sglmoe.worker.model_runner_kv import KvLayout
from sglmoe.worker.moe_layer import PagedExperts
from sglmoe.worker.moe_layer_method import install
from sglmoe.worker.owned_memory import Owned, manage
from sglmoe.worker.packed_experts import use_packed
from sglmoe.worker.step_state import Sizes

logger = logging.getLogger(__name__)


class Loaded(msgspec.Struct, frozen=True):
    """A model that is ready to run, and where its bytes went."""

    runner: Any  # sglang's ModelRunner
    experts: PagedExperts
    memory: MemoryManager
    tier: HostTier
    packing: Packing
    geometry: Geometry
    graphs: DecodeGraphs
    captured: CapturedSteps | None  # steps that page experts without the host
    dense_bytes: int
    top_k: int  # experts of a token in a layer; 0 for a dense model
    floor_frames: int
    max_running: int
    context_tokens: int
    load_seconds: float

    @property
    def arena_bytes(self) -> int:
        return self.geometry.arena_bytes


def start_process(server_args: Any, gpu_id: int, *, process_name: str) -> None:
    """What every process of sglang's does first: title, death with the launcher, logging, plugins, the published config."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import (
        SpawnRanks,
        get_context,
        get_device,
        get_schedule,
        publish,
    )
    from sglang.srt.utils import (
        configure_logger,
        kill_itself_when_parent_died,
        set_random_seed,
        suppress_other_loggers,
    )

    setproctitle.setproctitle(f"sglmoe::{process_name.lower()}")
    kill_itself_when_parent_died()
    configure_logger(server_args, prefix=f" {process_name}")
    suppress_other_loggers()
    load_plugins()
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=gpu_id))
    max_running = get_schedule().max_running_requests or DEFAULT_MAX_RUNNING
    get_context().override(
        "sglmoe",
        max_running_requests=max_running,
        # SGLang's own KV pool, whose tensors ours replace at once: as small as this many requests allow.
        max_total_tokens=2 * max_running,
        disable_overlap_schedule=True,
        # Our MoE layers record routing themselves: sglang's recorder indexes by token id, and ours are scaled.
        enable_return_routed_experts=False,
    )
    # Its copy into fixed buffers is sized by the stock pool.
    os.environ["SGLANG_EAGER_INPUT_NO_COPY"] = "1"
    set_random_seed(get_device().random_seed)


def load_model(
    server_args: Any,
    *,
    gpu_id: int,
    nccl_port: int,
    config: EngineConfig,
    on_progress: Callable[[str, int, int], None],
) -> Loaded:
    """Load the dense weights, remember where the experts are, and give the rest of the budget to one arena.

    Raises ValueError, with the numbers and the flag to change, where the budget can't hold the model's dense weights, one
    wave of experts and one request.
    """
    started = time.perf_counter()
    experts = new_experts(server_args, on_progress)
    on_progress("loading dense weights", 0, 0)
    runner = build_runner(server_args, gpu_id=gpu_id, nccl_port=nccl_port)
    check_layers(runner, experts)
    close_store(experts)
    use_packed(experts.store, config.packed_experts, server_args.model_path)
    dense_bytes = model_bytes(runner.model)
    runner.alloc_memory_pool()
    graphs = plan_decode_graphs(runner)
    kv = KvLayout.of(runner.token_to_kv_pool)
    geometry = cut_arena(kv, experts, config, graphs, dense_bytes, server_args.device)
    arena = torch.empty(geometry.arena_bytes, dtype=torch.uint8, device=runner.device)
    frames = arena[geometry.padding_bytes :]
    top_k = runner.model_config.hf_text_config.num_experts_per_tok if experts.shape else 0
    beside = graphs.lent_beside(runner.model_config.context_len, config.memory_policy)
    floor = floor_of(geometry, experts, top_k, beside)
    owned = manage(frames, geometry, experts, floor_frames=floor, config=config, graphs=graphs)
    memory = owned.memory
    kv.move_to(arena, geometry.page_tokens)
    if experts.shape:
        experts.attach(frames, geometry, frame_table=memory.frame_table, waves=memory.waves)
    fit_token_table(runner, geometry, floor)
    on_progress("starting attention backends", 0, 0)
    runner.init_attention_backends()
    captured = capture(runner, graphs, experts, top_k, frames, geometry, owned, on_progress)
    return Loaded(
        runner=runner,
        experts=experts,
        memory=memory,
        tier=owned.tier,
        packing=owned.packing,
        dense_bytes=dense_bytes,
        geometry=geometry,
        graphs=graphs,
        captured=captured,
        top_k=top_k,
        floor_frames=floor,
        max_running=runner.req_to_token_pool.size,
        context_tokens=runner.model_config.context_len,
        load_seconds=time.perf_counter() - started,
    )


def new_experts(server_args: Any, on_progress: Callable[[str, int, int], None]) -> PagedExperts:
    """On which SGLang builds the layers of the next model that is constructed."""
    inner_multiple = CPU_INNER_MULTIPLE if server_args.device == "cpu" else 1
    store = ExpertStore(rate=read_rate())
    experts = PagedExperts(store, TensorCounter(on_progress).count, inner_multiple)
    install(experts)
    return experts


def read_rate() -> ReadRate | None:
    """What READ_RATE in the environment, such as 200MB (a second), makes of the checkpoint's disk: for benchmarks."""
    rate = os.environ.get(READ_RATE)
    if rate is None:
        return None
    logger.warning("%s=%s: experts are read no faster from the checkpoint", READ_RATE, rate)
    return ReadRate(parse_bytes(rate, whole_bytes=0))


class TensorCounter:
    """Reports now and then how many expert tensors the checkpoint has yielded; models may load from several threads."""

    def __init__(self, on_progress: Callable[[str, int, int], None]):
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._num_tensors = 0

    def count(self) -> None:
        with self._lock:
            self._num_tensors += 1
            if self._num_tensors % 512 == 0:
                self._on_progress("expert tensors found", self._num_tensors, 0)


def check_layers(runner: Any, experts: PagedExperts) -> None:
    """Raises ValueError where the model has experts that SGLang did not build on ours."""
    config = runner.model_config.hf_config.to_dict()
    built = type(runner.model).__name__
    if why := refused_layers(config, built=built, paged=experts.layer_ids):
        raise why


def close_store(experts: PagedExperts) -> None:
    """Check that every expert was found, and let go of the mapped checkpoint."""
    num_experts = experts.shape.num_experts if experts.shape else 0
    experts.store.check_complete(len(experts.layer_ids), num_experts)
    if held_bytes := experts.store.unmap():
        logger.warning("%s", experts_held_beside_budget(held_bytes=held_bytes))


def decoding_bytes_of(store: ExpertStore, device: str) -> int:
    """What decoding packed experts takes of the device's memory beside their frames."""
    if device == "cpu" or not store.is_packed:
        return 0
    return decoding_bytes(store.stored_expert_bytes())


def cut_arena(
    kv: KvLayout,
    experts: PagedExperts,
    config: EngineConfig,
    graphs: DecodeGraphs,
    dense_bytes: int,
    device: str,
) -> Geometry:
    """What all else leaves of the budget, in frames. Raises ValueError where that is too little."""
    arena_bytes = arena_bytes_within(
        config.memory_budget_bytes,
        dense_bytes,
        decoding_bytes=decoding_bytes_of(experts.store, device),
        graph_bytes=graphs.reserved_bytes,
    )
    return kv.geometry(arena_bytes, experts, config, graphs)


def floor_of(
    geometry: Geometry, experts: PagedExperts, top_k: int, context_tokens: int | None
) -> int:
    """See `plan_floor`."""
    return plan_floor(
        geometry,
        num_layers=len(experts.layer_ids),
        num_experts=experts.shape.num_experts if experts.shape else 0,
        top_k=top_k,
        context_tokens=context_tokens,
    )


def capture(
    runner: Any,
    graphs: DecodeGraphs,
    experts: PagedExperts,
    top_k: int,
    frames: torch.Tensor,
    geometry: Geometry,
    owned: Owned,
    on_progress: Callable[[str, int, int], None],
) -> CapturedSteps | None:
    """Capture decode steps, if any are to be: those that run without the host, if they do."""
    if not graphs.is_full or not experts.shape:
        capture_graphs(runner, graphs, on_progress)
        return None
    its = Sizes(len(experts.layer_ids), experts.shape.num_experts, top_k, graphs.max_rows)
    memory, tier, _, letters = owned
    captured = captured_steps(
        its, experts, frames, geometry.frame_bytes, memory=memory, tier=tier, letters=letters
    )
    with captured.capturing():
        capture_graphs(runner, graphs, on_progress)
    return captured


def build_runner(server_args: Any, *, gpu_id: int, nccl_port: int) -> Any:
    """SGLang's ModelRunner with its weights loaded and no memory pools yet."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.layers.quantization.unquant import initialize_bf16_gemm_config
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.runtime_context import get_device, get_schedule

    initialize_moe_config()
    initialize_fp8_gemm_config()
    initialize_bf16_gemm_config()
    model_config = ModelConfig.from_server_args(server_args)
    bootstrap.init_parallel_runtime(
        server_args=server_args, device=get_device().device, dist_port=nccl_port
    )
    bootstrap.init_layer_runtime(model_config=model_config)
    return ModelRunner(
        model_config=model_config,
        mem_fraction_static=get_schedule().mem_fraction_static,
        gpu_id=gpu_id,
        nccl_port=nccl_port,
        server_args=server_args,
    )


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def fit_token_table(runner: Any, geometry: Geometry, floor: int) -> None:
    """Give the token table rows as long as the longest request that can be held.

    To be called before attention backends are made. Some read the table itself, those for CUDA through the translator.
    """
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    total_tokens = geometry.kv_tokens(floor)
    runner.req_to_token_pool = ReqToTokenPool(
        size=runner.req_to_token_pool.size,
        max_context_len=min(runner.model_config.context_len, total_tokens) + geometry.page_tokens,
        device=runner.device,
        enable_memory_saver=False,
    )
    runner.init_kv_index_translator()  # by which attention backends look KV ids up: in this table
