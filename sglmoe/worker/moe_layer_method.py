"""SGLang's methods of MoE layers, on paged experts: replaced through SGLang's own plugin hooks.

One of the files that know sglang.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sglmoe.errors import models
from sglmoe.memory.expert_layout import BlockFp8, ExpertFormat, ExpertLayout, Plain, part_name
from sglmoe.worker.moe_layer import Activation, ExpertShape, PagedExperts
from sglmoe.worker.routed import Routed

# The format of a method's weights, where activations have this type.
FormatOf = Callable[[Any, torch.dtype], ExpertFormat]


def install(experts: PagedExperts) -> None:
    """Have sglang build its MoE layers on `experts`; before the model is constructed."""
    from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    methods: dict[type, FormatOf] = {UnquantizedFusedMoEMethod: plain, Fp8MoEMethod: block_fp8}
    for method, format_of in methods.items():
        HookRegistry.register(
            f"{method.__module__}.{method.__name__}",
            make_paged_method(method, experts, format_of),
            HookType.REPLACE,
        )
    HookRegistry.apply_hooks()


def plain(method: Any, dtype: torch.dtype) -> ExpertFormat:
    return Plain(str(dtype).removeprefix("torch."))


def block_fp8(method: Any, dtype: torch.dtype) -> ExpertFormat:
    return BlockFp8(*method.quant_config.weight_block_size)


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
        no_bytes = torch.empty(0, dtype=getattr(torch, tensor.dtype))
        parameter = torch.nn.Parameter(no_bytes, requires_grad=False)
        parameter.weight_loader = partial(load_tensor, tensor.name.partition("_")[2])
        layer.register_parameter(tensor.name, parameter)


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
