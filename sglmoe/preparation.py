"""What both front doors do before any process starts: refuse what can't work, settle the device and the budget.

One of the files that know sglang.
"""

import os
from pathlib import Path
from socket import socket
from typing import Any

import msgspec
import torch

from sglmoe.checkpoint import check_checkpoint
from sglmoe.config import EngineConfig, Options, plan_config
from sglmoe.decode_graphs import GraphFlags, check_graphs, default_max_rows
from sglmoe.errors.models import not_understood
from sglmoe.errors.options import (
    accelerator_beside_cpu,
    full_graphs_beside_packed_share,
    itl_target_with_determinism,
    itl_target_with_whole_prompts,
    no_cuda_device,
    page_without_tokens,
)
from sglmoe.errors.options import refused_flags as flags_are_refused
from sglmoe.flags import refused_environment, refused_flags
from sglmoe.int4_models import SGLANG_METHOD
from sglmoe.machine import measure_machine
from sglmoe.plan.families import inner_size_of
from sglmoe.plan.model_shape import facts_of
from sglmoe.start_up import ChildEntry
from sglmoe.supported_models import (
    ModelFacts,
    Quantisation,
    moe_layers_of,
    num_experts_of,
    quantisation_of,
    refused_model,
    refused_weights,
)


def prepare(server_args: Any, options: Options) -> EngineConfig:
    """Check and resolve `server_args`, which must be as the operator gave them.

    Raises ValueError with one message for people: what is wrong and what to change.
    """
    refuse_flags(server_args)
    server_args.device = choose_device(server_args.device)
    settle_graphs(server_args)
    if server_args.device == "cuda":
        settle_for_paging(server_args)
    page_tokens = take_page_tokens(server_args)
    if is_local(server_args.model_path):
        check_checkpoint(Path(server_args.model_path))
    on_gpu = server_args.device == "cuda"
    settle_quantisation(server_args, read_config(server_args))
    model_config = resolve(server_args)
    capability = torch.cuda.get_device_capability(server_args.base_gpu_id) if on_gpu else None
    if why := refused_model(read_facts(model_config, capability)):
        raise why
    machine = measure_machine(device=server_args.device, gpu_id=server_args.base_gpu_id)
    config = plan_config(options, machine, page_tokens=page_tokens)
    if config.itl_target_seconds is not None:
        check_prompts_can_be_cut(server_args)
    if server_args.cuda_graph_backend_decode == "full":
        check_steps_need_no_host(config)
    return config


def check_prompts_can_be_cut(server_args: Any) -> None:
    """By measured times, which a target between tokens asks for. Raises ValueError."""
    if server_args.chunked_prefill_size == -1:
        raise itl_target_with_whole_prompts()
    if server_args.enable_deterministic_inference:
        raise itl_target_with_determinism()


def check_steps_need_no_host(config: EngineConfig) -> None:
    """As full graphs ask for. Raises ValueError."""
    if config.packed_share != 0.0:
        raise full_graphs_beside_packed_share()


def scheduler_entry(config: EngineConfig, viewers: socket | None = None) -> ChildEntry:
    """What sglang runs in place of its scheduler process. `viewers`: see `run_scheduler`."""
    worker = ChildEntry("sglmoe.worker.process", "run_worker")
    return ChildEntry(
        "sglmoe.scheduler.process",
        "run_scheduler",
        config=config,
        run_worker=worker,
        viewers=viewers,
    )


def detokenizer_entry() -> ChildEntry:
    """sglang's own detokenizer process, in a child of ours."""
    return ChildEntry("sglang.srt.managers.detokenizer_manager", "run_detokenizer_process")


def refuse_flags(server_args: Any) -> None:
    namespaces = flag_namespaces()
    values = {name: getattr(server_args, name) for name in namespaces}
    refused = refused_environment(os.environ)
    refused += refused_flags(values, flag_defaults(), namespaces)
    if refused:
        raise flags_are_refused(reasons=refused)


def flag_namespaces() -> dict[str, str]:
    """Every field of sglang's ServerArgs and the namespace it belongs to."""
    from sglang.srt.arg_groups.arg_utils import namespace_of
    from sglang.srt.server_args import ServerArgs

    namespaces = namespace_of(ServerArgs)
    return {field.name: namespaces[field.name] for field in msgspec.structs.fields(ServerArgs)}


def flag_defaults() -> dict[str, Any]:
    """The default of every field of sglang's ServerArgs; NODEFAULT for required ones."""
    from sglang.srt.server_args import ServerArgs

    return {
        field.name: field.default
        if field.default_factory is msgspec.NODEFAULT
        else field.default_factory()
        for field in msgspec.structs.fields(ServerArgs)
    }


def choose_device(device: str | None) -> str:
    """The device to run on. The CPU platform is active only where there is no accelerator."""
    available = torch.accelerator.is_available()
    if device in (None, "cuda") and torch.cuda.is_available():
        return "cuda"
    if device in (None, "cpu") and not available:
        return "cpu"
    if device == "cpu":
        raise accelerator_beside_cpu()
    raise no_cuda_device(device=str(device))


def settle_graphs(server_args: Any) -> None:
    """Check what is to be captured: nothing, unless it is asked for. Raises ValueError for what would be ignored."""
    server_args.disable_cuda_graph = True  # less than --cuda-graph-backend-decode
    flags = read_graph_flags(server_args)
    check_graphs(flags, on_gpu=server_args.device == "cuda")
    if flags.captures and not (flags.sizes or flags.max_size):
        server_args.cuda_graph_max_bs_decode = default_max_rows(server_args.max_running_requests)


def read_graph_flags(server_args: Any) -> GraphFlags:
    return GraphFlags(
        backend=server_args.cuda_graph_backend_decode,
        sizes=tuple(server_args.cuda_graph_bs_decode or ()),
        max_size=server_args.cuda_graph_max_bs_decode,
        no_padding=bool(server_args.disable_cuda_graph_padding),
    )


def settle_for_paging(server_args: Any) -> None:
    """Choose what paged experts need on a GPU."""
    server_args.disable_shared_experts_fusion = True
    server_args.moe_runner_backend = "triton"


def read_config(server_args: Any) -> dict[str, Any]:
    """The model's config.json, which may be downloaded for that; nothing where SGLang is to say what is wrong."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(
            server_args.model_path, revision=server_args.revision
        )
        return dict(config)
    except (ValueError, OSError):
        return {}


def settle_quantisation(server_args: Any, config: dict[str, Any]) -> None:
    """Have SGLang compute experts in GPTQ and AWQ with its Triton kernel, which reads frames; by itself it takes Marlin's,
    for which weights lie otherwise. Raises ValueError where it can't, before SGLang says so in its words.
    """
    quantisation = quantisation_of(config)
    if quantisation is None or quantisation.int4 is None:
        return
    if why := refused_weights(facts_of(config, server_args.dtype, server_args.device)):
        raise why
    server_args.quantization = SGLANG_METHOD


def take_page_tokens(server_args: Any) -> int | None:
    """Our arena's page size from --page-size. sglang's side sees pages of one token: our token ids are scaled."""
    page_tokens: int | None = server_args.page_size
    if page_tokens is not None and page_tokens < 1:
        raise page_without_tokens(num_tokens=page_tokens)
    server_args.page_size = None
    return page_tokens


def is_local(model_path: str) -> bool:
    """Whether a model path means a folder here rather than a repository to download."""
    return Path(model_path).exists() or model_path.startswith((".", "/", "~"))


def resolve(server_args: Any) -> Any:
    """Let sglang fill in its defaults; its ModelConfig."""
    from sglang.srt.arg_groups.overrides import model_config_of

    try:
        server_args.resolve_once()
        return model_config_of(server_args)
    except (ValueError, OSError, KeyError) as error:
        raise not_understood(model_path=server_args.model_path, why=str(error)) from error


def read_facts(model_config: Any, capability: tuple[int, int] | None) -> ModelFacts:
    """`capability`: the GPU's compute capability; None on a CPU."""
    from sglang.srt.configs.hybrid_arch import mambaish_config

    config = model_config.hf_text_config.to_dict()
    layer_types = set(config.get("layer_types") or ())
    method = (
        model_config.quantization
    )  # in SGLang's words, and also where a file beside the config says it
    quantisation = quantisation_of(config) or (Quantisation(method) if method else None)
    return ModelFacts(
        architecture=model_config.hf_config.architectures[0],
        num_experts=num_experts_of(config),
        moe_layers=tuple(moe_layers_of(model_config.hf_config.to_dict())),
        hidden_size=int(config.get("hidden_size") or 0),
        expert_inner_size=inner_size_of(config),
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=quantisation,
        on_cpu=capability is None,
        capability=capability,
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        generates=model_config.is_generation,
        multimodal=model_config.is_multimodal,
        encoder_decoder=model_config.is_encoder_decoder,
        recurrent_layers=mambaish_config(model_config) is not None,
        sliding_window_layers=model_config.is_hybrid_swa or "sliding_attention" in layer_types,
    )
