"""What the kernels cost on this GPU, each beside what it stands for: `python -m eval.kernel_speed [OUT.json]`.

page-in    bytes a second from page-locked memory into frames, against the driver's copy of as many experts
packed     the same of packed experts, with experts a second, against plain ones
dispatch   microseconds for one layer, by rows, beside SGLang's alignment, for which it stands too: nothing missing, all missing
products   SGLang's grouped GEMM on frames in random order, against contiguous weights; whether the bits are the same
step       microseconds of 48 captured layers that dispatch and page nothing in, as full graphs do: what it adds to alignment

Sizes are Qwen3-30B-A3B's. No GPU has run this yet.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl

import sglmoe.kernels.dispatch
from eval.servers import describe_run
from sglmoe.kernels.dispatch import dispatch
from sglmoe.kernels.exponent_codec.encode import encode
from sglmoe.kernels.exponent_codec.layout import read_layout
from sglmoe.kernels.exponent_codec.page_in_packed import PackedBlocks, page_in_packed
from sglmoe.kernels.page_in import page_in
from sglmoe.kernels.residency import DeviceResidency, PageIns
from sglmoe.memory.staging import slot_bytes

LAYERS, EXPERTS, TOP_K, HIDDEN, INNER = 48, 128, 8, 2048, 768
EXPERT_BYTES = 3 * HIDDEN * INNER * 2
NUM_FRAMES = 2 * EXPERTS
SET_FRAMES = 64
BLOCK_TOKENS = 16
GEMM_CONFIG = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 64,
    "BLOCK_SIZE_K": 64,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}


def microseconds(work: Callable[[], object]) -> float:
    """The median time, with the L2 cache emptied in between."""
    return float(1e3 * triton.testing.do_bench(work, warmup=50, rep=300, return_mode="median"))


def ints(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device="cuda")


def measure_page_in() -> dict[str, Any]:
    """By number of experts and of programs, GB/s."""
    blocks = torch.randint(0, 256, (64, EXPERT_BYTES), dtype=torch.uint8).pin_memory()
    arena = torch.empty(NUM_FRAMES * EXPERT_BYTES, dtype=torch.uint8, device="cuda")
    frames = ints(torch.randperm(NUM_FRAMES)[:64])
    found: dict[str, Any] = {}
    for num_experts in (1, 4, 16, 64):
        num_bytes = num_experts * EXPERT_BYTES
        target, source = arena[:num_bytes], blocks.view(-1)[:num_bytes]
        loads = partial(
            page_in,
            blocks,
            arena,
            frame_bytes=EXPERT_BYTES,
            sources=ints(range(64)),
            frames=frames,
            count=ints([num_experts]),
        )
        row = {"driver": microseconds(partial(target.copy_, source, non_blocking=True))}
        for programs in (32, 64, 128, 256, 512):
            row[f"{programs} programs"] = microseconds(partial(loads, num_programs=programs))
        found[f"{num_experts} experts"] = {
            name: num_bytes / spent / 1e3 for name, spent in row.items()
        }
    return found


def measure_page_in_packed() -> dict[str, Any]:
    """By number of experts, and of programs that decode."""
    part_bytes = EXPERT_BYTES // 3
    parts = [encode(torch.randn(part_bytes // 2).bfloat16()) for _ in range(3)]
    stops = [*accumulate(slot_bytes(len(part)) for part in parts)]
    block, places = torch.zeros(stops[-1], dtype=torch.uint8), []
    for stop, part in zip(stops, parts, strict=True):
        block[stop - len(part) : stop] = part
        places.append((stop - len(part), read_layout(part.numpy()).num_escapes))
    blocks = block.repeat(64, 1).pin_memory()
    its = PackedBlocks.empty([(part_bytes * part, part_bytes) for part in range(3)], 64, "cuda")
    its.stored.copy_(ints(places))
    plain = torch.randint(0, 256, (64, EXPERT_BYTES), dtype=torch.uint8).pin_memory()
    arena = torch.empty(NUM_FRAMES * EXPERT_BYTES, dtype=torch.uint8, device="cuda")
    where = {"sources": ints(range(64)), "frames": ints(torch.randperm(NUM_FRAMES)[:64])}
    found: dict[str, Any] = {}
    for num_experts in (1, 4, 16, 64):
        loads = {"frame_bytes": EXPERT_BYTES, **where, "count": ints([num_experts])}
        row = {"plain": (EXPERT_BYTES, partial(page_in, plain, arena, **loads))}
        for programs in (128, 256, 512, 1024):
            decode = partial(page_in_packed, blocks, arena, its=its, **loads)
            row[f"{programs} programs"] = blocks.shape[1], partial(decode, num_programs=programs)
        found[f"{num_experts} experts"] = its_rows = {}
        for name, (num_bytes, work) in row.items():
            experts_a_second = 1e6 * num_experts / microseconds(work)
            its_rows[name] = {
                "GB/s": 1e-9 * num_bytes * experts_a_second,
                "experts/s": experts_a_second,
            }
    return found


def new_residency(num_layers: int) -> tuple[DeviceResidency, PageIns]:
    """Each layer has the experts 0 to SET_FRAMES - 1."""
    state = DeviceResidency.empty(num_layers, EXPERTS, SET_FRAMES, "cuda")
    state.set_frames.copy_(torch.arange(num_layers * SET_FRAMES).view(num_layers, -1))
    state.set_owners.copy_(torch.arange(SET_FRAMES).expand(num_layers, -1))
    state.frame_table[:, :SET_FRAMES] = state.set_frames
    state.set_sizes.fill_(SET_FRAMES)
    state.block_of.copy_(torch.arange(EXPERTS).expand(num_layers, -1))
    return state, PageIns(ints([0] * SET_FRAMES), ints([0] * SET_FRAMES), ints([0]))


def dispatch_of(num_rows: int, state: DeviceResidency, out: PageIns) -> Callable[..., object]:
    """To be called with ids and the layer."""
    return partial(
        dispatch,
        num_rows=ints([num_rows]),
        state=state,
        page_ins=out,
        ids=ints([[0] * TOP_K] * num_rows),
        block_tokens=BLOCK_TOKENS,
    )


def measure_dispatch() -> dict[str, Any]:
    """By number of rows. Where all are missing, two halves of the experts take turns."""
    from sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size import (
        moe_align_block_size,
    )

    found = {}
    for num_rows in (1, 4, 8, 32, 64):
        state, out = new_residency(1)
        first = torch.arange(num_rows * TOP_K).view(num_rows, TOP_K) % SET_FRAMES
        halves = [ints(first), ints(first + EXPERTS - SET_FRAMES)]
        its = dispatch_of(num_rows, state, out)

        def both(its: Callable[..., object], halves: list[torch.Tensor]) -> None:
            for ids in halves:
                its(ids, 0)

        misses = microseconds(captured(partial(both, its, halves))) / 2
        align = partial(moe_align_block_size, halves[0], BLOCK_TOKENS, EXPERTS)
        row = {
            "all missing": misses,
            "alignment alone": microseconds(captured(align)),
        }
        its(halves[0], 0)
        for warps in (1, 2, 4, 8):  # that four are best is a guess
            with patch.object(sglmoe.kernels.dispatch, "num_warps", lambda _, warps=warps: warps):
                row[f"all there, {warps} warps"] = microseconds(
                    captured(partial(its, halves[0], 0))
                )
        found[f"{num_rows} rows"] = row
    return found


def measure_products() -> dict[str, Any]:
    """The first of a layer's two products, by number of tokens."""
    from sglang.kernels.ops.moe.fused_moe_triton_kernels import invoke_fused_moe_kernel
    from sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size import (
        moe_align_block_size,
    )

    rows, elements = 2 * INNER, EXPERT_BYTES // 2
    arena = torch.randn(NUM_FRAMES * elements, device="cuda", dtype=torch.bfloat16) * 0.02
    frames = arena.as_strided((NUM_FRAMES, rows, HIDDEN), (elements, HIDDEN, 1))
    table = ints(torch.randperm(NUM_FRAMES)[:EXPERTS])
    stock = frames[table.long()].contiguous()
    precision = dict.fromkeys(
        ("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant"),
        False,
    )
    found = {}
    for num_tokens in (1, 8, 64, 512):
        hidden = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        weights, ids = torch.rand(num_tokens, EXPERTS, device="cuda").topk(TOP_K)
        ids = ids.to(torch.int32)
        sorted_ids, blocks, padded = moe_align_block_size(ids, BLOCK_TOKENS, EXPERTS)
        outputs = [
            torch.zeros(num_tokens * TOP_K, rows, device="cuda", dtype=torch.bfloat16)
            for _ in range(2)
        ]
        runs = [
            partial(
                invoke_fused_moe_kernel,
                *(hidden, matrices, None, output, None, None, None, weights, ids, sorted_ids),
                *(block_ids, padded, False, TOP_K, GEMM_CONFIG),
                compute_type=tl.bfloat16,
                **precision,
            )
            for matrices, block_ids, output in (
                (stock, blocks, outputs[0]),
                (frames, table[blocks.clamp(0, EXPERTS - 1).long()], outputs[1]),
            )
        ]
        contiguous, framed = (microseconds(run) for run in runs)
        found[f"{num_tokens} tokens"] = {
            "contiguous": contiguous,
            "frames": framed,
            "ratio": framed / contiguous,
            "same_bits": bool(torch.equal(*outputs)),
        }
    return found


def measure_step() -> dict[str, Any]:
    """By number of requests; their experts are all there."""
    from sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size import (
        moe_align_block_size,
    )

    blocks = torch.zeros(EXPERTS, EXPERT_BYTES, dtype=torch.uint8).pin_memory()
    arena = torch.empty(SET_FRAMES * EXPERT_BYTES, dtype=torch.uint8, device="cuda")
    found = {}
    for num_tokens in (1, 8):
        state, out = new_residency(LAYERS)
        ids = ints(torch.arange(num_tokens * TOP_K).view(num_tokens, TOP_K))

        def align(ids: torch.Tensor) -> None:
            for _ in range(LAYERS):
                moe_align_block_size(ids, BLOCK_TOKENS, EXPERTS)

        def paged(its: Callable[..., object], ids: torch.Tensor, out: PageIns) -> None:
            for layer in range(LAYERS):
                its(ids, layer)
                page_in(
                    blocks,
                    arena,
                    frame_bytes=EXPERT_BYTES,
                    sources=out.sources,
                    frames=out.frames,
                    count=out.count,
                )

        its = dispatch_of(num_tokens, state, out)
        stock = microseconds(captured(partial(align, ids)))
        found[f"{num_tokens} tokens"] = {
            "added": microseconds(captured(partial(paged, its, ids, out))) - stock,
            "alignment alone": stock,
        }
    return found


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """The work as a graph."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay  # type: ignore[no-any-return]


def described() -> dict[str, Any]:
    """Machine, versions and commit, where there is a repository to tell it."""
    try:
        return describe_run()
    except (OSError, subprocess.CalledProcessError):
        return {"machine": {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}}


def main() -> None:
    found = {**described(), "triton": triton.__version__}
    for measure in (
        measure_page_in,
        measure_page_in_packed,
        measure_dispatch,
        measure_products,
        measure_step,
    ):
        name = measure.__name__.removeprefix("measure_")
        found[name] = measure()
        print(name, json.dumps(found[name], indent=1), flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
