"""Which of sglang's flags mean something here. What is not listed as honoured is refused unless it is at its default.

So nothing is silently ignored: a flag that a new sglang brings is refused until someone puts it in a table, and
`tests/e2e/test_flags.py` fails until then. Pure: knows the flags' names, not sglang.
"""

from collections.abc import Mapping
from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Honoured by sglang's HTTP server, tokenizer manager, detokenizer and launcher, which are unmodified.
FRONT_END = _names(
    """
    admin_api_key allow_auto_truncate api_key batch_notify_size bucket_e2e_request_latency
    bucket_inter_token_latency bucket_time_to_first_token chat_template completion_template
    crash_dump_folder custom_sigquit_handler default_chat_template_kwargs default_priority_value
    disable_tokenizer_batch_decode dynamic_batch_tokenizer_batch_size
    dynamic_batch_tokenizer_batch_timeout enable_cache_report enable_dynamic_batch_tokenizer
    enable_http2 enable_response_store enable_ssl_refresh enable_tokenizer_batch_encode
    export_metrics_to_file export_metrics_to_file_dir extra_metric_labels fastapi_root_path
    file_storage_path gc_threshold gc_warning_threshold_secs generation_tokens_buckets
    hf_chat_template_name host http2_initial_connection_window_size http2_max_concurrent_streams
    incremental_streaming_output log_level log_level_http log_requests log_requests_format
    log_requests_level log_requests_target port preferred_sampling_params prompt_tokens_buckets
    reasoning_parser return_input_ids return_output_ids sampling_defaults served_model_name
    skip_server_warmup ssl_ca_certs ssl_certfile ssl_keyfile ssl_keyfile_password
    stream_response_default_include_usage tokenizer_metrics_allowed_custom_labels
    tokenizer_metrics_custom_labels_header tool_call_parser tool_server trust_request_chat_template
    uvicorn_access_log_exclude_prefixes warmups weight_version
    """
)

# Honoured by sglang's ModelRunner, model loader, attention and sampler, in our worker.
MODEL = _names(
    """
    attention_backend bf16_gemm_backend context_length debug_tensor_dump_layers
    debug_tensor_dump_output_folder decode_attention_backend decrypted_config_file
    disable_flashinfer_autotune dist_timeout download_dir dtype enable_deterministic_inference
    enable_fp32_lm_head enable_layerwise_nvtx_marker enable_tf32_matmul
    flashinfer_autotune_skip_ops flashinfer_mla_disable_ragged forward_hooks
    json_model_override_args model_checksum model_config_parser model_loader_extra_config model_path
    nccl_port prefill_attention_backend random_seed revision sampling_backend show_time_cost
    tokenizer_backend tokenizer_mode tokenizer_path triton_attention_num_kv_splits
    triton_attention_reduce_in_fp32 triton_attention_split_tile_size trust_remote_code
    weight_loader_drop_cache_after_load weight_loader_prefetch_checkpoints
    weight_loader_prefetch_num_threads
    """
)

# To be honoured by our own scheduler and worker.
OURS = _names(
    """
    abort_on_priority_when_disabled base_gpu_id chunked_prefill_size
    constrained_json_disable_any_whitespace constrained_json_max_whitespace_cnt
    cuda_graph_bs_decode cuda_graph_max_bs_decode
    decode_log_interval disable_cuda_graph_padding disable_priority_preemption enable_metrics
    enable_mixed_chunk enable_priority_scheduling enable_return_routed_experts max_prefill_tokens
    max_queued_requests max_running_requests page_size priority_scheduling_preemption_threshold
    schedule_conservativeness schedule_low_priority_values_first skip_tokenizer_init stream_interval
    watchdog_timeout
    """
)

# They ask for what is so anyway. (disable_overlap_schedule also settles which token penalties count.)
ALREADY_SO = _names(
    """
    disable_cuda_graph disable_decode_cuda_graph disable_overlap_schedule disable_prefill_cuda_graph
    disable_shared_experts_fusion sleep_on_idle
    """
)

HONOURED = FRONT_END | MODEL | OURS | ALREADY_SO

# Honoured at these values only. The default, whatever it is, is always among them.
VALUES: dict[str, tuple[object, ...]] = {
    "cuda_graph_backend_decode": ("disabled", "breakable", "full"),
    "cuda_graph_backend_prefill": ("disabled",),
    "device": ("cpu", "cuda"),
    "grammar_backend": ("xgrammar", "none"),
    "kv_cache_dtype": ("auto", "bf16", "bfloat16"),
    "load_format": ("auto", "safetensors"),
    "model_impl": ("auto", "sglang"),
    "moe_runner_backend": ("auto", "triton"),
    "quantization": ("moe_wna16",),
    "schedule_policy": ("fcfs", "lpm", "lof", "random"),
}

BUDGET = "KV cache and experts share one budget; use --memory-budget"
PARALLEL = "sglmoe drives one device for now; leave it out, or start one server for each device"
GRAPHS = "decode steps alone can be captured, with --cuda-graph-backend-decode; leave it out"
SPECULATIVE = "speculative decoding does not work yet; leave it out"
LORA = "LoRA adapters do not work yet; merge them into the checkpoint"
MULTIMODAL = "only text goes in and out for now; leave it out"
QUANTIZED = "weights are served as the checkpoint has them, in bf16, fp16, fp32, block fp8, GPTQ or AWQ; leave it out"
DISAGGREGATION = "disaggregated prefill and decode do not work yet; leave it out"
OFFLOAD = "the budget already decides what is on the device; use --memory-budget"
TIERS = "caching KV beyond the device does not work yet; leave it out"
GRPC = "only the HTTP server is there for now; leave it out"
WEIGHTS = "weights come from the checkpoint at start-up and stay; restart the server for others"
OTHER_MODELS = "it is for models that do not work yet; leave it out"
EMBEDDING = "only generation works for now; use unmodified SGLang for embeddings"

# Why, and what to do, for all of a namespace of ServerArgs.
NAMESPACE_REASONS = {
    "disagg": DISAGGREGATION,
    "exec.comm": PARALLEL,
    "exec.dllm": "diffusion models do not work yet; leave it out",
    "exec.graph": GRAPHS,
    "exec.mamba": "models with recurrent layers do not work yet; leave it out",
    "exec.moe": "experts are placed by sglmoe on one device; leave it out",
    "exec.offload": OFFLOAD,
    "exec.overlap": "steps are not cut into micro batches; leave it out",
    "lora": LORA,
    "memory": TIERS,
    "mm": MULTIMODAL,
    "parallel": PARALLEL,
    "spec": SPECULATIVE,
}

# Why, and what to do, for single flags; goes before a namespace's reason.
_REASONS_BY_FLAGS = {
    BUDGET: "enable_unified_memory max_total_tokens mem_fraction_static",
    DISAGGREGATION: "optimistic_prefill_attempts prefill_only_disable_kv_cache",
    EMBEDDING: "enable_mis is_embedding",
    GRPC: """grpc_mode grpc_port grpc_response_timeout_secs grpc_worker_threads sidecar sidecar_args
        smg_grpc_mode smg_http_sidecar_port""",
    MULTIMODAL: """asr_max_buffer_seconds asr_max_concurrent_sessions
        enable_precise_embedding_interpolation encoder_only encoder_urls language_model_only
        language_only""",
    OFFLOAD: "enable_paged_experts paged_experts_num_resident",
    OTHER_MODELS: """c128_page_size disable_chunked_prefix_cache disable_hybrid_swa_memory
        dsa_decode_backend dsa_paged_mqa_logits_backend dsa_prefill_backend dsa_topk_backend
        dsa_triton_union dsv4_attn_backend dsv4_prefill_backend enable_decoder_swa_bounded_replay
        enable_deepseek_v4_fp4_indexer enable_dsa_fused_indexer enable_encoder_swa_bounded_replay
        enable_return_indexer_topk mamba_full_memory_ratio max_mamba_cache_size qsa_indexer_dtype
        swa_full_tokens_ratio swa_prefix_tails""",
    PARALLEL: """enable_dynamic_chunking enable_metrics_for_all_schedulers enable_prefill_delayer
        gpu_id_step min_free_slots_delay prefill_delayer_forward_passes_buckets
        prefill_delayer_max_delay_ms prefill_delayer_max_delay_passes
        prefill_delayer_queue_min_ratio prefill_delayer_token_usage_low_watermark
        prefill_delayer_wait_seconds_buckets use_ray""",
    QUANTIZED: """fp4_gemm_runner_backend fp8_gemm_runner_backend modelopt_checkpoint_restore_path
        modelopt_checkpoint_save_path modelopt_export_path modelopt_quant
        prefill_kv_cache_dequant_dtype quantization quantization_param_path quantize_and_serve
        rl_quant_profile""",
    SPECULATIVE: """aux_hidden_state_capture decrypted_draft_config_file
        enable_draft_weights_cpu_backup enable_return_aux_hidden_states
        return_aux_hidden_state_layer_ids""",
    TIERS: "enable_lmcache",
    WEIGHTS: """checkpoint_engine_wait_weights_before_ready custom_weight_loader enable_memory_saver
        enable_weights_cpu_backup engine_info_bootstrap_port modelexpress_config
        remote_instance_weight_loader_backend remote_instance_weight_loader_seed_instance_ip
        remote_instance_weight_loader_seed_instance_service_port
        remote_instance_weight_loader_send_weights_group_ports
        remote_instance_weight_loader_start_seed_via_transfer_engine rl_on_policy_target
        weight_cache_mode weight_cache_socket weight_cache_timeout""",
    "hidden states are not returned yet; leave it out": """enable_return_hidden_states
        return_hidden_states_mode""",
    "texts are not watermarked yet; leave it out": """enable_watermark watermark_config
        watermark_context_window watermark_default_enabled watermark_enforce_all watermark_key
        watermark_key_b watermark_max_probability watermark_mixing_probability""",
    "prefixes and experts are evicted by one policy; leave it out": """radix_eviction_policy
        radix_eviction_policy_config""",
    "use xgrammar, which needs no such setting, or none": """constrained_json_whitespace_pattern
        disable_outlines_disk_cache grammar_backend""",
    "traces would miss the scheduler; use --enable-metrics": """enable_trace otlp_service_name
        otlp_traces_endpoint trace_modules""",
    "the scheduler does not publish this yet; use --enable-metrics": """enable_forward_pass_metrics
        enable_mfu_metrics enable_request_time_stats_logging forward_pass_metrics_ipc_name
        forward_pass_metrics_worker_id kv_events_config load_publish_endpoint
        load_snapshot_publish_interval stat_loggers""",
    "sglmoe's scheduler has no such setting; leave it out": """num_continuous_decode_steps
        prefill_decode_interval prefill_decode_interval_min_bs prefill_max_requests
        retraction_policy sampling_mask_max_tokens scheduler_recv_interval soft_watchdog_timeout""",
    "KV lies in sglmoe's arena, which the canary does not know; leave it out": """kv_canary
        kv_canary_real_data kv_canary_sweep_interval""",
    "the kernel is for other machines or models; leave it out": """debug_tensor_dump_input_file
        enable_amd_monokernel enable_fused_qk_norm_rope enable_lean_attention
        enable_nvidia_megakernel mlx_enable_sampling msprobe_dump_config""",
    "there is one tokenizer and one detokenizer process for now; leave it out": """
        detokenizer_worker_num enable_http_worker_reuseport tokenizer_worker_num""",
    "sessions do not work yet; send the whole conversation": "enable_streaming_session",
    "finished requests stay cached whole, and thinking is not masked; leave it out": """
        enable_strict_thinking strip_thinking_cache""",
    "custom logit processors do not work yet; leave it out": "enable_custom_logit_processor",
    "experts move between steps, so steps are not compiled; leave it out": "enable_torch_compile",
    "prefixes are cached always, and give way when memory is needed": "disable_radix_cache",
    "experts are loaded from the checkpoint while serving; keep it": "delete_ckpt_after_loading",
    "whole files would be read into memory, and experts come from them one by one; leave it out": "weight_loader_disable_mmap",
    "experts are read from safetensors files in place; convert the checkpoint": "load_format",
    "experts of other implementations can't be paged; use auto or sglang": "model_impl",
    "KV is kept in the model's dtype or in bf16; use auto or bfloat16": "kv_cache_dtype",
    "only CPUs and CUDA devices are served; use cpu or cuda": "device",
    "use fcfs, lpm, lof or random; --enable-priority-scheduling goes with any": "schedule_policy",
    "processes are not bound to NUMA nodes; start the server under numactl": "numa_node",
    "use full, breakable or disabled": "cuda_graph_backend_decode",
    "weights are there before graphs are captured; leave it out": "startup_weight_load_mode",
}
REASONS = {name: why for why, names in _REASONS_BY_FLAGS.items() for name in _names(names)}
UNKNOWN = "sglmoe does not honour it yet; leave it out"

# Environment variables that put something else in the place of what we build on.
REFUSED_ENVIRONMENT = {
    "SGLANG_RUST_SERVER": "sglmoe's scheduler speaks to the Python front end; unset it",
    "SGLANG_GRPC_PORT": GRPC,
}


def refused_flags(
    values: Mapping[str, Any], defaults: Mapping[str, Any], namespaces: Mapping[str, str]
) -> list[str]:
    """One sentence for each flag that can't be served: its name and value, why, and what to do.

    `values` are as they were given, before sglang resolves them; `defaults` and `namespaces` are sglang's.
    """
    return [
        f"{flag_name(name)}={value}: {reason(name, namespaces.get(name, ''))}"
        for name, value in values.items()
        if not is_honoured(name, value, defaults[name])
    ]


def is_honoured(name: str, value: object, default: object) -> bool:
    if name in HONOURED or name.startswith("_") or value == default:
        return True
    if default is None and value is False:  # "off" said aloud
        return True
    return value in VALUES.get(name, ())


def reason(name: str, namespace: str) -> str:
    return REASONS.get(name) or NAMESPACE_REASONS.get(namespace) or UNKNOWN


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def refused_environment(environ: Mapping[str, str]) -> list[str]:
    return [
        f"environment variable {name}: {why}"
        for name, why in REFUSED_ENVIRONMENT.items()
        if environ.get(name, "").lower() not in ("", "0", "false")
    ]


def unclassified(namespaces: Mapping[str, str]) -> list[str]:
    """Flags, given with their namespaces, that no table says anything about. They are refused, but without thought."""
    return [
        name
        for name, namespace in namespaces.items()
        if not name.startswith("_")
        and name not in HONOURED
        and name not in VALUES
        and reason(name, namespace) == UNKNOWN
    ]
