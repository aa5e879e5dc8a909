"""Which checkpoints in GPTQ and AWQ can be served: those whose experts SGLang computes with its Triton kernel.

Pure: judges what a config.json says.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from sglmoe.errors import models
from sglmoe.errors.user_error import UserError

METHODS: tuple[Literal["gptq", "awq"], ...] = ("gptq", "awq")
# The value of SGLang's --quantization under which it computes them so. By itself it takes Marlin's kernel, where it can.
SGLANG_METHOD = "moe_wna16"
# Whose tests are tests/e2e/test_int4.py. (SGLang has another class for Mixtral in 4 bits, without a layer of experts to page.)
ARCHITECTURES = ("Qwen3MoeForCausalLM", "Qwen2MoeForCausalLM")
# What SGLang's kernels for the other layers take: MARLIN_SUPPORTED_GROUP_SIZES, from an A100 on.
GROUPS = (32, 64, 128)
CAPABILITY = (8, 0)
FORMS = {"gptq": ("", "gptq"), "awq": ("", "gemm")}  # how weights lie in the checkpoint
MATRICES = ("gate_proj", "up_proj", "down_proj")  # of an expert, as those families call them


class Int4(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint in GPTQ or AWQ says of itself, as far as it decides."""

    method: Literal["gptq", "awq"]
    group: int = 0  # inputs that share a scale
    has_zeros: bool = False
    left_out: tuple[
        str, ...
    ] = ()  # GPTQ: patterns of modules that are not quantised; AWQ: parts of their names
    peculiar: str = ""  # what of it is not served, in its own words


def int4_of(said: Mapping[str, Any]) -> Int4 | None:
    """Of a `quantization_config`; None where it is another method's."""
    named = str(said.get("quant_method") or "").lower()
    method = next((its for its in METHODS if its == named), None)
    if method is None:
        return None
    group, rules = said.get("group_size"), said.get("dynamic") or {}
    return Int4(
        method=method,
        group=group if isinstance(group, int) else 0,
        has_zeros=bool(said.get("zero_point") if method == "awq" else not said.get("sym")),
        left_out=tuple(
            (said.get("modules_to_not_convert") or ())
            if method == "awq"
            else (rule.removeprefix("-:") for rule in rules if rule.startswith("-:"))
        ),
        peculiar=next(_peculiarities(said, method), ""),
    )


def _peculiarities(said: Mapping[str, Any], method: str) -> Iterator[str]:
    if said.get("bits") != 4:
        yield f"bits={said.get('bits')}"
    if said.get("group_size") not in GROUPS:
        yield f"group_size={said.get('group_size')}"
    if said.get("desc_act"):
        yield "desc_act=true"
    key = "version" if method == "awq" else "checkpoint_format"
    if (form := str(said.get(key) or "").lower()) not in FORMS[method]:
        yield f"{key}={form}"
    if method == "awq" and not said.get("zero_point"):
        yield "zero_point=false"
    if method == "gptq" and not isinstance(said.get("sym"), bool):
        yield f"sym={said.get('sym')}"
    if said.get("lm_head"):
        yield "lm_head=true"
    if said.get("modules_in_block_to_quantize"):
        yield "modules_in_block_to_quantize"
    rules = said.get("dynamic") or {}
    yield from (f"dynamic {rule!r}" for rule in rules if not _leaves_out(rule))


def _leaves_out(rule: str) -> bool:
    """Whether it is a pattern of modules that are not quantised."""
    try:
        re.compile(rule.removeprefix("-:"))
    except re.error:
        return False
    return rule.startswith("-:")


def refused_int4(
    its: Int4,
    *,
    architecture: str,
    moe_layers: Sequence[int],
    num_experts: int,
    on_cpu: bool,
) -> UserError | None:
    """Why a checkpoint that says this can't be served and what to do, or None: before SGLang is asked about the model."""
    if its.peculiar:
        return models.int4(method=its.method, what=its.peculiar)
    if architecture not in ARCHITECTURES:
        return models.int4_family(name=architecture, method=its.method, known=ARCHITECTURES)
    if rule := _rule_for_experts(its, moe_layers, num_experts):
        return models.int4(method=its.method, what=f"experts that are left out ({rule})")
    if on_cpu and its.method == "awq":
        return models.awq_on_cpu()
    if not on_cpu and its.method == "gptq" and its.has_zeros:
        return models.int4(method=its.method, what="sym=false")
    return None


def is_left_out(its: Int4, module: str) -> bool:
    """Whether SGLang takes a module's weights as they are: `get_dynamic_override`, `is_layer_skipped_quant`."""
    return _rule_for(its, module) is not None


def _rule_for(its: Int4, module: str) -> str | None:
    if its.method == "awq":
        return next((rule for rule in its.left_out if rule in module), None)
    return next((rule for rule in its.left_out if re.match(rule, module)), None)


def _rule_for_experts(its: Int4, moe_layers: Sequence[int], num_experts: int) -> str | None:
    """The first that leaves out experts: SGLang and the frames have all in one form."""
    for layer in moe_layers:
        for expert in (0, num_experts - 1):
            for name in MATRICES:
                module = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
                if rule := _rule_for(its, module):
                    return rule
    return None
