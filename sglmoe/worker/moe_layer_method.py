"""SGLang's methods of MoE layers, on paged experts: replaced through SGLang's own plugin hooks.

One of the files that know sglang.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sglmoe.errors import models
from sglmoe.errors.checkpoints import unordered_groups
from sglmoe.memory.expert_layout import (
    W4A16,
    BlockFp8,
    ExpertFormat,
    ExpertLayout,
    Plain,
    part_name,
)
from sglmoe.worker.moe_layer import Activation, ExpertShape, PagedExperts
from sglmoe.worker.routed import Routed

# The format of a method's weights, where activations have this type.
FormatOf = Callable[[Any, torch.dtype], ExpertFormat]
# In checkpoints in GPTQ, and in no frame: which group each input belongs to, and zero points of symmetric weights.
GPTQ_EXTRAS = ("w13_g_idx", "w2_g_idx", "w13_qzeros", "w2_qzeros")


def install(experts: PagedExperts) -> None:
    """Have sglang build its MoE layers on `experts`; before the model is constructed."""
    from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
    from sglang.srt.layers.quantization.moe_wna16 import MoeWNA16Method
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    methods: dict[type, FormatOf] = {
        UnquantizedFusedMoEMethod: plain,
        Fp8MoEMethod: block_fp8,
        MoeWNA16Method: w4a16,
    }
    for method, format_of in methods.items():
        HookRegistry.register(
            f"{method.__module__}.{method.__name__}",
            make_paged_method(method, experts, format_of),
            HookType.REPLACE,
        )
    HookRegistry.apply_hooks()


def plain(method: Any, dtype: torch.dtype) -> ExpertFormat:
    return Plain(name_of(dtype))


def block_fp8(method: Any, dtype: torch.dtype) -> ExpertFormat:
    return BlockFp8(*method.quant_config.weight_block_size)


def w4a16(method: Any, dtype: torch.dtype) -> ExpertFormat:
    its = method.quant_config
    return W4A16(name_of(dtype), its.group_size, its.has_zp, its.linear_quant_method)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_paged_method(base: type, experts: PagedExperts, format_of: FormatOf) -> type:
    """A subclass of sglang's method (its isinstance checks go on to hold) whose weights are `experts`."""
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import eager_on_graph

    class PagedFusedMoEMethod(base):
        def create_weights(
            self,
            layer: torch.nn.Module,
            num_experts: int,
            hidden_size: int,
            intermediate_size_per_partition: int,
            params_dtype: torch.dtype,
            with_bias: bool = False,
            **attributes: Any,
        ) -> None:
            if with_bias or not layer.moe_runner_config.is_gated:
                raise models.ungated_experts()
            self.with_bias = False
            shape = ExpertShape(
                num_experts,
                hidden_size,
                intermediate_size_per_partition,
                format_of(self, params_dtype),
            )
            self.layer_index = experts.add_layer(layer.layer_id, shape)
            register_parameters(layer, shape.layout, self.load_tensor)
            register_extras(layer, self.layer_index, shape.format)

        def load_tensor(
            self,
            what: str,
            parameter: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
        ) -> None:
            part = part_name(shard_id, what)
            experts.take_tensor(self.layer_index, expert_id, part, loaded_weight)

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            self.activation = activation_of(layer.moe_runner_config)

        def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
            from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

            weights, ids, router_logits = dispatch_output.topk_output
            hidden = dispatch_output.hidden_states
            output = self.compute(hidden, weights, ids, router_logits, layer.moe_runner_config)
            return StandardCombineInput(hidden_states=output)

        # A captured graph breaks here: the host reads the routing, whenever it is replayed.
        @eager_on_graph
        def compute(self, hidden: Any, weights: Any, ids: Any, logits: Any, config: Any) -> Any:
            routing = Routed(self.layer_index, ids, logits, hidden)
            return experts.compute(routing, weights, config=config, activation=self.activation)

    return PagedFusedMoEMethod


def register_parameters(
    layer: torch.nn.Module, layout: ExpertLayout, load_tensor: Callable[..., None]
) -> None:
    """Empty ones: the model's loader finds its parameters by their names, and how to load them."""
    for tensor in layout.tensors:
        register_parameter(layer, tensor.name, getattr(torch, tensor.dtype), load_tensor)


def register_extras(layer: torch.nn.Module, layer_index: int, its: ExpertFormat) -> None:
    """Likewise, of what the checkpoint has and no frame."""
    if not isinstance(its, W4A16) or its.source != "gptq":
        return
    for name in GPTQ_EXTRAS:
        if not hasattr(layer, name):
            register_parameter(layer, name, torch.int32, partial(check_extra, layer_index, its))


def check_extra(
    layer_index: int,
    its: W4A16,
    what: str,
    parameter: torch.nn.Parameter,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
) -> None:
    """Whether inputs belong to groups as they follow each other: `g_idx` is int32 `[inputs]`, the group of each."""
    in_order = torch.arange(len(loaded_weight), dtype=torch.int32) // its.group
    if what == "g_idx" and not torch.equal(loaded_weight.cpu(), in_order):
        raise unordered_groups(layer=layer_index, expert=expert_id, part=shard_id)


def register_parameter(
    layer: torch.nn.Module, name: str, dtype: torch.dtype, load_tensor: Callable[..., None]
) -> None:
    parameter = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    parameter.weight_loader = partial(load_tensor, name.partition("_")[2])
    layer.register_parameter(name, parameter)


def activation_of(config: Any) -> Activation:
    """What `moe_forward_native` does between an expert's two products."""
    from sglang.srt.layers.activation import GeluAndMul, SiluAndMul

    if config.apply_router_weight_on_input:
        raise models.weighted_inputs()
    if config.activation == "silu" and config.gemm1_alpha is None:
        return SiluAndMul()  # type: ignore[no-any-return]
    if config.activation == "gelu":
        return GeluAndMul()  # type: ignore[no-any-return]
    raise models.unknown_activation(name=config.activation)
