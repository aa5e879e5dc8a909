"""How fast this machine is at what decode steps do: a few seconds of products and copies of the model's own shapes.

Weights are random and as many as do not fit a cache, where the model has that many.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, assert_never

from sglmoe.checkpoint import read_header
from sglmoe.memory.checkpoint_form import checkpoint_form
from sglmoe.memory.expert_layout import W4A16, BlockFp8, Plain, plan_layout
from sglmoe.plan.cost_model import GPU_LAYER_SECONDS, CostModel, assumed_speeds
from sglmoe.plan.model_shape import EXPERT_TENSOR, Model, ModelShape
from sglmoe.units import ceil_div

# Arbitrary: more than caches, less than would be felt.
WORKING_SET_BYTES = 128 * 2**20
# Arbitrary, of each figure. The least of many short rounds counts, because others may use the machine too.
MAX_SECONDS, ROUND_SECONDS = 0.5, 0.01
# What SGLang's layers, attention request by request, the scheduler and the sockets take on a CPU whatever the sizes,
# in units of a small torch operation (1.1 us there). From eval/results/serving-demo-cpu: with all experts resident the
# demo model's 6 layers gave tokens 10, 27 and 66 ms apart at 1, 8 and 32 requests; at 32 a missing expert cost 57 us.
LAYER_OPS = 1000.0
REQUEST_LAYER_OPS = 200.0
EXPERT_OPS = 15.0
LOAD_OPS = 45.0


def measure_costs(model: Model, *, device: str, request_tokens: int) -> CostModel:
    """Costs on this machine; on a GPU bandwidths alone, its layers are assumed (no GPU has run sglmoe)."""
    if device == "cpu":
        return _cpu_costs(model, request_tokens)
    return _gpu_costs(model, request_tokens)


# --------------------------------------------------------------------------------------------- on a CPU


def _cpu_costs(model: Model, request_tokens: int) -> CostModel:
    shape = model.shape
    op = small_op_seconds()
    dense_byte, dense_row_byte = product_seconds(shape)
    expert, expert_row = expert_seconds(shape) if shape.num_experts else (0.0, 0.0)
    load = LOAD_OPS * op + (read_seconds(model) if shape.num_experts else 0.0)
    return CostModel(
        fixed_seconds=shape.num_layers * LAYER_OPS * op + shape.dense_bytes * dense_byte,
        request_seconds=shape.num_layers * REQUEST_LAYER_OPS * op
        + shape.dense_bytes * dense_row_byte
        + shape.num_moe_layers * shape.top_k * expert_row
        + request_tokens * shape.token_bytes * dense_byte,
        expert_seconds=EXPERT_OPS * op + expert,
        load_seconds=load,
        disk_seconds=load
        + conversion_seconds(shape)
        + shape.expert_bytes / assumed_speeds("cpu").disk_bytes_per_second,
    )


def small_op_seconds() -> float:
    """A torch operation that computes next to nothing: what calling costs."""
    import torch

    left, right = torch.ones(8), torch.ones(8)
    return least_seconds(lambda _: left.add(right))


def product_seconds(shape: ModelShape) -> tuple[float, float]:
    """Multiplying by dense weights: for each byte, and for each byte and row beyond the first."""
    from torch.nn import functional as F

    hidden = shape.hidden_size
    num_rows = 2 * max(1, WORKING_SET_BYTES // (hidden * shape.item_bytes) // 16)
    weights = matrix_maker(num_rows, hidden, shape)
    num_bytes = num_rows * hidden * weight_bytes(shape)
    one, many = _rows(1, hidden, shape), _rows(16, hidden, shape)
    one_seconds = least_by_threads(lambda _: F.linear(one, weights()))
    many_seconds = least_by_threads(lambda _: F.linear(many, weights()))
    return one_seconds / num_bytes, max(0.0, many_seconds - one_seconds) / 15 / num_bytes


def expert_seconds(shape: ModelShape) -> tuple[float, float]:
    """An expert of one row as `worker/moe_layer.py` computes it, and each further row of it."""
    from torch.nn import functional as F

    count = min(shape.all_experts, max(2, WORKING_SET_BYTES // shape.expert_bytes))
    inner, hidden = shape.inner_size, shape.hidden_size
    experts = [
        (matrix_maker(2 * inner, hidden, shape), matrix_maker(hidden, inner, shape))
        for _ in range(count)
    ]

    def compute(rows: Any) -> Callable[[int], Any]:
        def run(number: int) -> Any:
            up, down = experts[number % count]
            gate, value = F.linear(rows, up()).chunk(2, dim=-1)
            return F.linear(F.silu(gate) * value, down())

        return run

    one_seconds = least_by_threads(compute(_rows(1, hidden, shape)))
    many_seconds = least_by_threads(compute(_rows(8, hidden, shape)))
    return one_seconds, max(0.0, many_seconds - one_seconds) / 7


def read_seconds(model: Model) -> float:
    """Reading an expert: from the checkpoint's page cache; without one, copying as many bytes."""
    import numpy as np

    size = model.shape.expert_bytes
    if not model.shards:
        target = np.empty(size, np.uint8)
        source = np.ones(max(size, WORKING_SET_BYTES), np.uint8)
        starts = range(0, source.nbytes - size + 1, size)
        return least_seconds(lambda n: np.copyto(target, source[starts[n % len(starts)] :][:size]))
    path, offsets = _expert_offsets(model.shards[0])
    part_bytes = size // 3  # gate, up and down
    parts = [memoryview(bytearray(part_bytes)) for _ in range(3)]
    with path.open("rb", buffering=0) as file:
        number = file.fileno()

        def read(count: int) -> None:
            start = offsets[count % len(offsets)]
            for part in parts:
                os.preadv(number, [part], start)

        return least_seconds(read)


def conversion_seconds(shape: ModelShape) -> float:
    """Making of an expert as the checkpoint has it what a frame has: 0 where that is the same."""
    import numpy as np

    layout = plan_layout(shape.format, hidden=shape.hidden_size, inner=shape.inner_size)
    sources = []
    for tensor in layout.tensors:
        form = checkpoint_form(shape.format, tensor, tensor.dtype)
        if form.convert is not None:
            sources += [(form.convert, np.zeros(tensor.part_bytes, np.uint8))] * len(tensor.parts)
    if not sources:
        return 0.0

    def convert(_: int) -> None:
        for its, raw in sources:
            its(raw)

    return least_seconds(convert)


def _expert_offsets(shard: Path) -> tuple[Path, list[int]]:
    """Where the tensors of a few experts begin; no more than the working set, so that reading once warms them."""
    header, first = read_header(shard)
    starts = [
        first + entry["data_offsets"][0]
        for name, entry in header.items()
        if EXPERT_TENSOR.search(name)
    ]
    return shard, starts[:64] or [first]


def matrix_maker(height: int, width: int, shape: ModelShape) -> Callable[[], Any]:
    """Some weights as a CPU has them, and gets them when it multiplies: quantised ones are dequantised each time."""
    import torch

    from sglmoe.kernels import block_fp8, int4

    values, its, dtype = torch.randn(height, width), shape.format, _dtype(shape)
    if isinstance(its, Plain):
        plain = values.to(dtype)
        return lambda: plain
    if isinstance(its, W4A16):
        groups = width // its.group
        pairs = torch.zeros(height, width // 2, dtype=torch.uint8)
        zeros = torch.zeros(height // 2, groups, dtype=torch.uint8) if its.has_zeros else None
        ones = torch.ones(height, groups, dtype=dtype)
        return partial(int4.dequantise, pairs, ones, zeros, group=its.group, dtype=dtype)
    weights = values.to(torch.float8_e4m3fn)
    scales = torch.ones(ceil_div(height, its.rows), ceil_div(width, its.columns))
    blocks = {"rows": its.rows, "columns": its.columns}
    return partial(block_fp8.dequantise, weights, scales, **blocks, dtype=dtype)


def weight_bytes(shape: ModelShape) -> float:
    """Of one weight of a dense matrix."""
    match shape.format:
        case Plain():
            return shape.item_bytes
        case BlockFp8():
            return 1
        case W4A16():
            return 0.5
        case _:
            assert_never(shape.format)


def _dtype(shape: ModelShape) -> Any:
    import torch

    return torch.float32 if shape.item_bytes == 4 else torch.bfloat16


def _rows(count: int, size: int, shape: ModelShape) -> Any:
    import torch

    return torch.randn(count, size).to(_dtype(shape))


def least_by_threads(run: Callable[[int], Any]) -> float:
    """With all threads or one, which is faster where others keep a core busy: threads wait for each other."""
    import torch

    num_threads = torch.get_num_threads()
    try:
        least = least_seconds(run)
        torch.set_num_threads(1)
        return min(least, least_seconds(run))
    finally:
        torch.set_num_threads(num_threads)


def least_seconds(run: Callable[[int], Any]) -> float:
    """Of one call, which is told its number; on average within the fastest round."""
    run(0)
    started = time.perf_counter()
    run(1)
    calls = max(1, int(ROUND_SECONDS / max(time.perf_counter() - started, 1e-7)))
    seconds: list[float] = []
    number = 0
    deadline = time.perf_counter() + MAX_SECONDS
    while not seconds or time.perf_counter() < deadline:
        started = time.perf_counter()
        for _ in range(calls):
            run(number)
            number += 1
        seconds.append((time.perf_counter() - started) / calls)
    return min(seconds)


# --------------------------------------------------------------------------------------------- on a GPU


def _gpu_costs(model: Model, request_tokens: int) -> CostModel:
    import torch

    shape = model.shape
    size = max(shape.expert_bytes, 2**20)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    frame = torch.empty(size, dtype=torch.uint8, device="cuda")
    source = torch.empty(WORKING_SET_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copied(to: Any, what: Any) -> Callable[[int], None]:
        def run(_: int) -> None:
            to.copy_(what, non_blocking=True)
            torch.cuda.synchronize()

        return run

    byte_seconds = least_seconds(copied(target, source)) / (2 * WORKING_SET_BYTES)  # read, written
    load = least_seconds(copied(frame, host)) * shape.expert_bytes / size
    return CostModel(
        fixed_seconds=shape.num_layers * GPU_LAYER_SECONDS + shape.dense_bytes * byte_seconds,
        request_seconds=request_tokens * shape.token_bytes * byte_seconds,
        expert_seconds=shape.expert_bytes * byte_seconds,
        load_seconds=load,
        disk_seconds=load
        + conversion_seconds(shape)
        + shape.expert_bytes / assumed_speeds("cuda").disk_bytes_per_second,
    )
