"""Models whose experts or KV can't be paged."""

from collections.abc import Sequence
from pathlib import Path

from sglmoe.errors.user_error import UserError

UNMODIFIED = "use unmodified SGLang"


def encoder_decoder(*, name: str) -> UserError:
    return UserError(f"{name} is an encoder-decoder model; sglmoe serves decoders, {UNMODIFIED}")


def multimodal(*, name: str) -> UserError:
    return UserError(f"{name} is multimodal; only text models work for now, {UNMODIFIED}")


def not_generating(*, name: str) -> UserError:
    return UserError(f"{name} does not generate text; {UNMODIFIED} for embeddings and scores")


def recurrent_layers(*, name: str) -> UserError:
    return UserError(f"{name} has recurrent layers, whose state is not paged yet; {UNMODIFIED}")


def sliding_window_layers(*, name: str) -> UserError:
    return UserError(f"{name} has sliding-window layers, whose KV is not paged yet; {UNMODIFIED}")


def quantised(*, method: str) -> UserError:
    return UserError(
        f"the checkpoint is quantised ({method}), which can't be paged yet; "
        "use a bf16, fp16 or fp32 one, one in fp8 whose weight_block_size is square, such as [128, 128], or one in GPTQ or AWQ"
    )


def int4(*, method: str, what: str) -> UserError:
    """`what`: the setting that is not served, as the checkpoint's config has it."""
    return UserError(
        f"the checkpoint is in {method} with {what}, which can't be paged yet; use a bf16, fp16 or fp32 one, or one in 4 bits "
        "with groups of 32, 64 or 128 that has all experts in GPTQ (desc_act=false, and on a GPU sym=true) or AWQ (gemm, "
        "zero_point=true), and lm_head as it was"
    )


def int4_family(*, name: str, method: str, known: Sequence[str]) -> UserError:
    return UserError(
        f"{name} in {method} is not tested; these are: {', '.join(known)}. For others use a bf16, fp16 or fp32 checkpoint"
    )


def int4_uneven_groups(*, hidden: int, inner: int, group: int) -> UserError:
    return UserError(
        f"experts of hidden size {hidden} and inner size {inner} in groups of {group}: only whole groups are served; use a "
        "checkpoint with smaller groups, or a bf16, fp16 or fp32 one"
    )


def int4_dtype(*, dtype: str) -> UserError:
    return UserError(
        f"--dtype={dtype}: weights in 4 bits are multiplied in bfloat16 or float16; leave it out"
    )


def int4_on_older_gpu(*, capability: str, least: str) -> UserError:
    return UserError(
        f"this GPU has compute capability {capability}, and SGLang's kernels for weights in 4 bits need {least} (RTX 30, "
        "A100); use a bf16, fp16 or fp32 checkpoint"
    )


def awq_on_cpu() -> UserError:
    return UserError(
        "the checkpoint is in AWQ, which SGLang 0.5.23 serves on GPUs alone (its moe_wna16 asks for one); on a CPU use one in "
        "GPTQ, or a bf16, fp16 or fp32 one"
    )


def not_int4(*, given: str) -> UserError:
    return UserError(
        f"--quantization={given} is for checkpoints whose config.json says that they are in GPTQ or AWQ; leave it out"
    )


def fp8_family(*, name: str, known: Sequence[str]) -> UserError:
    return UserError(
        f"{name} in fp8 is not tested; these are: {', '.join(known)}. For others use a bf16, fp16 or fp32 checkpoint"
    )


def fp8_uneven_blocks(*, hidden: int, inner: int, block: int) -> UserError:
    return UserError(
        f"experts of hidden size {hidden} and inner size {inner} in fp8 blocks of {block}: SGLang's kernels want whole "
        "blocks; use a bf16, fp16 or fp32 checkpoint"
    )


def fp8_dtype(*, dtype: str) -> UserError:
    return UserError(
        f"--dtype={dtype}: weights in fp8 are multiplied in bfloat16 or float16; leave it out"
    )


def fp8_on_older_gpu(*, capability: str, least: str) -> UserError:
    return UserError(
        f"this GPU has compute capability {capability}, and Triton has fp8 from {least} on (RTX 40, L4, H100); use a bf16, "
        "fp16 or fp32 checkpoint"
    )


def unknown_family(*, name: str, known: Sequence[str]) -> UserError:
    return UserError(
        f"the experts of {name} can't be paged yet; these can: {', '.join(known)}. For others, {UNMODIFIED}"
    )


def unpaged_experts(
    *, name: str, built: str, num_unpaged: int, num_layers: int, known: Sequence[str]
) -> UserError:
    """`built`: the class that SGLang has taken for the model."""
    return UserError(
        f"{name} has experts in {num_layers} layers, and SGLang built it as {built}, in which those of {num_unpaged} can't be "
        f"paged; use a bf16, fp16 or fp32 checkpoint of {', '.join(known)}, or {UNMODIFIED}"
    )


def tied_embeddings(*, name: str) -> UserError:
    return UserError(
        f"{name} with tie_word_embeddings=true: SGLang 0.5.23 does not tie the output layer "
        "and would answer garbage; save the checkpoint with an lm_head of its own"
    )


def uneven_experts(*, layer: int, shape: str, first: str) -> UserError:
    return UserError(
        f"layer {layer} has experts of shape {shape}, earlier ones {first}: "
        f"models whose experts differ from layer to layer can't be paged yet; {UNMODIFIED}"
    )


def ungated_experts() -> UserError:
    return UserError(f"experts with biases or without a gate can't be paged yet; {UNMODIFIED}")


def weighted_inputs() -> UserError:
    return UserError(f"router weights on the input can't be paged yet; {UNMODIFIED}")


def unknown_activation(*, name: str) -> UserError:
    return UserError(f"experts with activation {name!r} can't be paged yet; {UNMODIFIED}")


def unknown_kv(*, kind: str) -> UserError:
    return UserError(f"KV of kind {kind} does not fit the arena yet; {UNMODIFIED}")


def uneven_kv(*, shapes: str) -> UserError:
    return UserError(
        f"K and V rows of different shapes do not fit the arena yet: {shapes}; {UNMODIFIED}"
    )


def no_architecture() -> UserError:
    return UserError("config.json names no architecture; take the checkpoint's own")


def not_understood(*, model_path: str, why: str) -> UserError:
    """`why`: SGLang's or transformers' words."""
    return UserError(f"SGLang can't read the configuration of {model_path}: {why}")


def not_here(*, model_path: str) -> UserError:
    return UserError(
        f"{model_path} is neither a folder nor in Hugging Face's cache, and a plan downloads nothing; "
        f"fetch its config first (hf download {model_path} config.json), or name one with --config-file"
    )


def no_config(*, folder: Path) -> UserError:
    return UserError(
        f"{folder} is not a folder with a config.json; name a model's folder with --model-path"
    )
