"""A layer's experts computed by SGLang's own fused MoE kernels, out of frames: on CUDA.

The stock layer's sequence (align, GEMM, activation, GEMM, sum) with two things exchanged: weights are views of the arena, and
blocks of rows have ids of frames. Kernels, their tuned configs and the order of each sum are the stock layer's, so the output
has its bits, whichever frames experts are in and in however many waves they come (`tests/kernels/test_layer.py`, in Triton's
interpreter; no GPU has run it).

One of the files that know sglang.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, assert_never

import numpy as np
import numpy.typing as npt
import torch

from sglmoe.kernels.blocks import wave_blocks
from sglmoe.kernels.dispatch import Dispatched
from sglmoe.memory.expert_layout import W4A16, BlockFp8, Plain
from sglmoe.memory.experts import ABSENT, ExpertIds
from sglmoe.worker.frame_views import FrameViews

QUANTISATION = ("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16")
UNQUANTISED = dict.fromkeys((*QUANTISATION, "per_channel_quant"), False)
SCALES = ("w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale")
NO_SCALES = dict.fromkeys(SCALES)
NO_BIASES = dict.fromkeys(("b1", "b2"))


# `defer_sum` is for plain weights alone; for others this gives the same, and allocates it twice.
WITHOUT_SUM = {"no_combine": True, "no_combine_keep_router_weight": True}


class Quantised(NamedTuple):
    """What SGLang's sequence takes as weights; how it is told what they are, and to leave out the sum over experts."""

    weights: str  # names of w13's and w2's tensors, behind the matrix's
    kinds: dict[str, bool]
    scales: dict[str, torch.Tensor | None]
    block_shape: list[int] | None
    without_sum: dict[str, bool]


def quantised(views: FrameViews) -> Quantised:
    """As the stock layer tells it: `TritonMoeQuantInfo` of its methods."""
    match views.format:
        case Plain():
            deferred = {"defer_sum": True, "no_combine": False}
            return Quantised("weight", UNQUANTISED, NO_SCALES, None, deferred)
        case BlockFp8(rows, columns):
            names = {"w1_scale": "w13_weight_scale_inv", "w2_scale": "w2_weight_scale_inv"}
            kind = "use_fp8_w8a8"
            weights, block = "weight", [rows, columns]
        case W4A16(group=group, has_zeros=has_zeros):
            names = {"w1_scale": "w13_scales", "w2_scale": "w2_scales"}
            if has_zeros:
                names |= {"w1_zp": "w13_qzeros", "w2_zp": "w2_qzeros"}
            kind = "use_int4_w4a16"
            weights, block = "qweight", [0, group]
        case _:
            assert_never(views.format)
    scales = NO_SCALES | {name: views.tensors[its] for name, its in names.items()}
    return Quantised(weights, UNQUANTISED | {kind: True}, scales, block, WITHOUT_SUM)


class Settings(NamedTuple):
    """How SGLang computes, tuned for the number of rows: what its sequence takes, in order."""

    config: dict[str, Any]
    down_config: dict[str, Any] | None
    down_moe_use_tma: bool
    up_moe_use_tma: bool

    @property
    def block_tokens(self) -> int:
        """Rows of one expert that are a block."""
        return int(self.config["BLOCK_SIZE_M"])


class Aligned(NamedTuple):
    """What SGLang makes of a routing: how to compute, and rows sorted by expert, in blocks of one expert each."""

    settings: Settings
    rows: torch.Tensor
    experts: torch.Tensor  # of each block
    num_padded: torch.Tensor


class GroupedExperts:
    """Computes with `views`, which are on the device."""

    def __init__(self, views: FrameViews, num_experts: int):
        self._quantised = quantised(views)
        self._w13, self._w2 = (
            views.tensors[f"{matrix}_{self._quantised.weights}"] for matrix in ("w13", "w2")
        )
        self._num_experts = num_experts
        # Stock weights without bytes: by their shapes SGLang looks configs up and aligns.
        self._stock = [
            torch.empty(num_experts, *its.shape[1:], dtype=its.dtype, device="meta")
            for its in (self._w13, self._w2)
        ]
        self._settings: dict[tuple[int, int], Settings] = {}  # by rows and experts a row

    def forward(
        self,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        *,
        waves: Iterable[ExpertIds],
        frame_of: npt.NDArray[np.int32],
        config: Any,
    ) -> torch.Tensor:
        """The layer's output `[tokens, hidden]`.

        `hidden`: `[tokens, hidden]`; `weights`, `ids`: `[tokens, top_k]`; `waves`: each of these experts once; `frame_of`:
        int32 `[num_experts]`, true for the experts of a wave while it is computed; `config`: SGLang's MoeRunnerConfig.
        """
        aligned = self._align(hidden, ids)
        outputs: torch.Tensor | None = None  # [tokens, top_k, hidden]
        for wave in waves:
            table = self._wave_table(wave, frame_of, ids.device)
            computed = self._compute(hidden, weights, ids, aligned, table, config)
            if outputs is None:
                outputs = computed
            else:
                torch.where((table[ids.long()] >= 0).unsqueeze(-1), computed, outputs, out=outputs)
        return self._combine(outputs, hidden, config)

    def block_tokens(self, hidden: torch.Tensor, ids: torch.Tensor) -> int:
        """Of the blocks that `forward_dispatched` takes, for a step of this shape. The first time it aligns something that is
        thrown away; SGLang computes each size before it captures it, so that is in no graph."""
        return self._settings_for(hidden, ids).block_tokens

    def forward_dispatched(
        self,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        dispatched: Dispatched,
        *,
        config: Any,
    ) -> torch.Tensor:
        """The same in one wave and without the host, to be captured: blocks know their frames. `ids`: for their shape."""
        blocks = dispatched.pairs, dispatched.frames, dispatched.num_padded
        settings = self._settings_for(hidden, ids)
        outputs = self._sequence(hidden, weights, ids, blocks, settings, config)
        return self._combine(outputs, hidden, config)

    def _settings_for(self, hidden: torch.Tensor, ids: torch.Tensor) -> Settings:
        """SGLang looks them up by shapes alone, and aligns in the same breath: ids that are experts', as it checks none."""
        shape = (len(hidden), ids.shape[1])
        if shape not in self._settings:
            self._settings[shape] = self._align(hidden, torch.zeros_like(ids)).settings
        return self._settings[shape]

    def _align(self, hidden: torch.Tensor, ids: torch.Tensor) -> Aligned:
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

        config, down_config, down_tma, up_tma, *aligned = fused_moe._prepare_fused_moe_run(
            hidden,
            *self._stock,
            ids,
            block_shape=self._quantised.block_shape,
            **self._quantised.kinds,
        )
        return Aligned(Settings(config, down_config, down_tma, up_tma), *aligned)

    def _compute(
        self,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        aligned: Aligned,
        table: torch.Tensor,
        config: Any,
    ) -> torch.Tensor:
        """Weighted outputs of the experts that the table has a frame of, `[tokens, top_k, hidden]`; others mean nothing."""
        blocks = wave_blocks(
            aligned.rows,
            aligned.experts,
            aligned.num_padded,
            frame_table=table,
            block_tokens=aligned.settings.block_tokens,
            num_pairs=ids.numel(),
        )
        output: torch.Tensor = self._sequence(
            hidden, weights, ids, blocks, aligned.settings, config
        )
        return output

    def _combine(self, outputs: Any, hidden: torch.Tensor, config: Any) -> Any:
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

        return fused_moe.moe_combine_topk(
            intermediate_cache3=outputs,
            out_hidden_states=torch.empty_like(hidden),
            routed_scaling_factor=config.routed_scaling_factor,
        )

    def _wave_table(
        self, wave: ExpertIds, frame_of: npt.NDArray[np.int32], device: torch.device
    ) -> torch.Tensor:
        table = np.full(self._num_experts, ABSENT, np.int32)
        table[wave] = frame_of[wave]
        # CUDA has taken the bytes when this returns, as they are not page-locked, and does not wait for the stream.
        return torch.from_numpy(table).to(device, non_blocking=True)

    def _sequence(
        self,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        blocks: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        settings: Settings,
        config: Any,
    ) -> Any:
        """Weighted outputs of the blocks' rows, `[tokens, top_k, hidden]`; other rows mean nothing."""
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

        return fused_moe._fused_moe_kernel_sequence(
            hidden,
            self._w13,
            self._w2,
            weights,
            ids,
            *blocks,
            *settings,
            activation=config.activation,
            is_gated=config.is_gated,
            gemm1_alpha=config.gemm1_alpha,
            gemm1_limit=config.gemm1_clamp_limit,
            swiglu_limit=config.swiglu_limit,
            routed_scaling_factor=config.routed_scaling_factor,
            apply_router_weight_on_input=False,
            inplace=False,
            filter_expert=False,
            block_shape=self._quantised.block_shape,
            **NO_BIASES,
            **self._quantised.scales,
            **self._quantised.kinds,
            **self._quantised.without_sum,
        )
