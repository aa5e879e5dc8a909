"""Our kernels on a GPU: what their references say, the stock layer's bits, captured in a graph. Skipped without a GPU.

Sizes are those of Qwen3-30B-A3B's layers, with fewer experts.
"""

from collections.abc import Callable

import msgspec
import pytest
import torch

from sglmoe.demo_model import DEMO_MODEL
from sglmoe.kernels import blocks, dispatch, mailbox, page_in, reference, residency
from sglmoe.memory.device_transfer import page_lock
from sglmoe.memory.host_tier import page_locked

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EXPERTS, TOP_K, HIDDEN, INNER = 32, 8, 2048, 768
EXPERT_ELEMENTS = 3 * HIDDEN * INNER
FRAME_ELEMENTS = EXPERT_ELEMENTS + 128  # what lies behind an expert is not its own
# What SGLang's sequence wants to be told that it has not got, and that it is not to do.
SCALES = ("w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale")
NOTHING = ("b1", "b2", *SCALES, "block_shape", "gemm1_alpha", "gemm1_limit")
QUANTISED = ("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16")
OFF = (
    *QUANTISED,
    "per_channel_quant",
    "no_combine",
    "inplace",
    "apply_router_weight_on_input",
    "filter_expert",
)


Blocks = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # as SGLang's sequence takes them


def ints(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def to_cpu(state: msgspec.Struct) -> msgspec.Struct:
    return type(state)(
        **{name: its.cpu().clone() for name, its in msgspec.structs.asdict(state).items()}
    )


def assert_same(state: msgspec.Struct, expected: msgspec.Struct) -> None:
    for name, its in msgspec.structs.asdict(state).items():
        assert torch.equal(its.cpu(), getattr(expected, name)), name


def new_page_ins(num: int, device: str = DEVICE) -> residency.PageIns:
    return residency.PageIns(
        *(torch.zeros(n, dtype=torch.int32, device=device) for n in (num, num, 1))
    )


# ---------------------------------------------------------------------- each kernel, its reference


def test_page_in_beyond_2_31_words() -> None:
    expert_bytes, frame_bytes = 9 * 2**20, 9 * 2**20 + 4096
    num_frames = 2**33 // frame_bytes + 2
    if torch.cuda.mem_get_info()[0] < (num_frames + 8) * frame_bytes:
        pytest.skip("needs 9 GiB of GPU memory")
    arena = torch.empty(num_frames * frame_bytes, dtype=torch.uint8, device=DEVICE)
    host = torch.from_numpy(page_locked(5, expert_bytes, page_lock))  # as the server has it
    host.random_(0, 256)
    frames = [num_frames - 1, 0, num_frames - 2]
    page_in.page_in(
        host,
        arena,
        frame_bytes=frame_bytes,
        sources=ints([4, 0, 2]),
        frames=ints(frames),
        count=ints([3]),
    )
    for frame, block in zip(frames, (4, 0, 2), strict=True):
        assert torch.equal(arena[frame * frame_bytes :][:expert_bytes].cpu(), host[block])


@pytest.mark.parametrize("seed", range(20))
def test_dispatch(seed: int) -> None:
    """One row, or as many as are compared and written in several goes; some pad the step, and some ids are none."""
    random = torch.Generator().manual_seed(seed)
    num_experts, max_frames = (60, 128, 256, 512)[seed % 4], 48
    rows, block_tokens = (1, 5, 64)[seed % 3], (16, 64)[seed % 2]
    state = residency.DeviceResidency.empty(2, num_experts, max_frames, DEVICE)
    state.set_frames.copy_(torch.randperm(2 * max_frames, generator=random).view(2, -1))
    state.set_sizes.copy_(torch.tensor([max_frames, max_frames // 2]))
    state.block_of.copy_(torch.randperm(2 * num_experts, generator=random).view(2, -1))
    expected, out, expected_out = (
        to_cpu(state),
        new_page_ins(max_frames),
        new_page_ins(max_frames, "cpu"),
    )
    for _ in range(6):
        state.used_key.add_(1)
        expected.used_key.add_(1)
        for layer in range(2):
            ids = torch.randint(-1, num_experts + 1, (rows, TOP_K), generator=random)
            num_rows = torch.randint(0, rows + 1, (1,), generator=random).to(torch.int32)
            its, wanted = {"block_tokens": block_tokens}, {"block_tokens": block_tokens}
            its |= {"num_rows": num_rows.to(DEVICE), "state": state, "page_ins": out}
            wanted |= {"num_rows": num_rows, "state": expected, "page_ins": expected_out}
            its["ids"] = torch.empty(rows, TOP_K, dtype=torch.int32, device=DEVICE)
            wanted["ids"] = torch.empty(rows, TOP_K, dtype=torch.int32)
            got = dispatch.dispatch(ids.to(DEVICE), layer, **its)
            dispatched = reference.dispatch(ids, layer, **wanted)
            assert_same(state, expected)
            assert torch.equal(its["ids"].cpu(), wanted["ids"])
            count = int(expected_out.count)
            assert int(out.count) == count
            assert torch.equal(out.sources[:count].cpu(), expected_out.sources[:count])
            assert torch.equal(out.frames[:count].cpu(), expected_out.frames[:count])
            for name, used in msgspec.structs.asdict(dispatched).items():
                assert torch.equal(getattr(got, name)[: len(used)].cpu(), used), name


def test_a_letter_carries_the_bytes_that_were_copied_before_it() -> None:
    """The compute stream looks again and again, without an event; when the table names the frame, its bytes are all there."""
    size = 2**24
    state = residency.DeviceResidency.empty(1, 8, 8, DEVICE)
    box = mailbox.Mailbox.empty(1, room=4, device=DEVICE)
    step = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    arena = torch.zeros(2, size, dtype=torch.uint8, device=DEVICE)
    prefetch = torch.cuda.Stream()
    for number in range(1, 8):
        host = torch.full((size,), number, dtype=torch.uint8).pin_memory()
        state.frame_table.fill_(-1)
        state.set_sizes.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(prefetch):
            arena[1].copy_(host, non_blocking=True)
            mailbox.post(box, layer=0, expert=3, frame=1, step=0)
        looks = []
        while not looks or not bool(looks[-1][0]):
            for _ in range(8):  # queued one behind the other: nobody waits for the host in between
                mailbox.commit(box, 0, state, step=step)
                is_named = state.frame_table[0, 3] == 1
                looks.append(torch.stack([is_named.to(torch.int64), arena[1].ne(number).sum()]))
        for is_named, num_wrong in torch.stack(looks).tolist():
            assert not (is_named and num_wrong)


@pytest.mark.usefixtures("server_args")
def test_sglang_stores_kv_where_our_ids_say_and_nothing_at_the_first() -> None:
    """Layer 1 of 2, in pages of 4 tokens, the last of them behind 4 GiB. Id 0 is padding to SGLang, so no request has it."""
    from sglang.srt.mem_cache.memory_pool import _set_kv_buffer_impl

    page_tokens, heads, dim = 4, 2, 64
    page_rows, num_pages = 4 * page_tokens, 2**20 + 8
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of GPU memory")
    rows = torch.zeros(num_pages * page_rows, heads, dim, dtype=torch.bfloat16, device=DEVICE)
    views = [rows[index * page_tokens :] for index in range(4)]  # K and V of both layers
    ids = [0, page_rows + 1, (num_pages - 1) * page_rows + page_tokens - 1]
    keys, values = torch.randn(2, len(ids), heads, dim, dtype=torch.bfloat16, device=DEVICE)
    _set_kv_buffer_impl(
        keys,
        values,
        views[2],
        views[3],
        torch.tensor(ids, device=DEVICE),
        row_dim=heads * dim,
        store_dtype=torch.bfloat16,
        device_module=torch.cuda,
        size_limit=len(views[3]),
    )
    for stored, given, begin in ((views[2], keys, 2), (views[3], values, 3)):
        assert not stored[0].any()
        for place, its in list(zip(ids, given, strict=True))[1:]:
            assert torch.equal(stored[place], its)
            assert torch.equal(rows[begin * page_tokens + place], its)
    assert int(rows.any(dim=2).sum()) == 2 * 2 * heads  # and nowhere else


# ------------------------------------------------------------------------------- the layer's bits


class Layer:
    """Weights, their frames in an arena, and a token's routing."""

    def __init__(self, num_frames: int, num_tokens: int):
        random = torch.Generator(device=DEVICE).manual_seed(3)
        shape = {"generator": random, "device": DEVICE, "dtype": torch.bfloat16}
        self.w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN, **shape) * 0.02
        self.w2 = torch.randn(EXPERTS, HIDDEN, INNER, **shape) * 0.02
        self.hidden = torch.randn(num_tokens, HIDDEN, **shape)
        self.arena = torch.full(
            (num_frames * FRAME_ELEMENTS,), float("nan"), dtype=torch.bfloat16, device=DEVICE
        )
        self.frames13 = self.arena.as_strided(
            (num_frames, 2 * INNER, HIDDEN), (FRAME_ELEMENTS, HIDDEN, 1)
        )
        self.frames2 = self.arena.as_strided(
            (num_frames, HIDDEN, INNER),
            (FRAME_ELEMENTS, INNER, 1),
            storage_offset=2 * INNER * HIDDEN,
        )
        self.random = random

    def route(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.rand(num_tokens, EXPERTS, generator=self.random, device=DEVICE)
        weights, ids = scores.topk(TOP_K)
        return weights, ids.to(torch.int32)

    def compute(
        self,
        weights: torch.Tensor,
        ids: torch.Tensor,
        place: Callable[[Blocks, int], Blocks] | None = None,
    ) -> torch.Tensor:
        """SGLang's sequence up to the sum, `[T, k, hidden]`: stock weights, or frames. `place`: from sorted ids, the expert of
        each block, how many are in use, and a block's rows, to the same with frames."""
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

        config, down_config, down_tma, up_tma, rows, experts, padded = (
            fused_moe._prepare_fused_moe_run(
                self.hidden,
                self.w13,
                self.w2,
                ids,
                use_fp8_w8a8=False,
                use_int8_w8a8=False,
                use_int8_w8a16=False,
                use_int4_w4a16=False,
                per_channel_quant=False,
                block_shape=None,
            )
        )
        w13, w2, placed = self.w13, self.w2, (rows, experts, padded)
        if place is not None:
            placed = place(placed, config["BLOCK_SIZE_M"])
            w13, w2 = self.frames13, self.frames2
        nothing = dict.fromkeys(NOTHING)
        off = dict.fromkeys(OFF, False)
        return fused_moe._fused_moe_kernel_sequence(
            self.hidden,
            w13,
            w2,
            weights,
            ids,
            *placed,
            config,
            down_config,
            down_tma,
            up_tma,
            activation="silu",
            is_gated=True,
            routed_scaling_factor=None,
            defer_sum=True,
            **nothing,
            **off,
        )


@pytest.fixture(scope="module")
def server_args() -> None:
    """What SGLang's layers look up; any model will do. Plugins may know of kernels that are compiled already."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    server_args = ServerArgs(model_path=str(DEMO_MODEL), attention_backend="triton")
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 600])
@pytest.mark.usefixtures("server_args")
def test_frames_give_the_stock_layers_bits(num_tokens: int) -> None:
    layer = Layer(2 * EXPERTS + 1, num_tokens)
    table = torch.randperm(2 * EXPERTS + 1, device=DEVICE)[:EXPERTS].to(torch.int32)
    layer.frames13[table.long()] = layer.w13
    layer.frames2[table.long()] = layer.w2
    weights, ids = layer.route(num_tokens)

    def place(placed: Blocks, block_tokens: int) -> Blocks:
        return blocks.wave_blocks(
            *placed, frame_table=table, block_tokens=block_tokens, num_pairs=ids.numel()
        )

    from_frames = layer.compute(weights, ids, place)
    assert torch.equal(from_frames, layer.compute(weights, ids))


@pytest.mark.usefixtures("server_args")
def test_a_captured_layer_pages_in_what_each_replay_needs() -> None:
    """Two tokens, frames for 16 of 32 experts: dispatch, page-in and both products in one graph."""
    num_frames = 2 * TOP_K
    layer = Layer(num_frames, 2)
    host = torch.cat([layer.w13.reshape(EXPERTS, -1), layer.w2.reshape(EXPERTS, -1)], dim=1)
    host = host.view(torch.uint8).cpu().pin_memory()
    state = residency.DeviceResidency.empty(1, EXPERTS, num_frames, DEVICE)
    state.set_frames.copy_(torch.arange(num_frames).flip(0).view(1, -1))
    state.set_sizes.fill_(num_frames)
    state.block_of.copy_(torch.arange(EXPERTS).view(1, -1))
    out = new_page_ins(num_frames)
    weights, ids = layer.route(2)

    num_rows, written = ints([2]), torch.empty_like(ids)

    def place(_: Blocks, block_tokens: int) -> Blocks:
        its = dispatch.dispatch(
            ids,
            0,
            num_rows=num_rows,
            state=state,
            page_ins=out,
            ids=written,
            block_tokens=block_tokens,
        )
        page_in.page_in(
            host,
            layer.arena.view(torch.uint8),
            frame_bytes=2 * FRAME_ELEMENTS,
            sources=out.sources,
            frames=out.frames,
            count=out.count,
        )
        return its.pairs, its.frames, its.num_padded

    def step() -> torch.Tensor:
        state.used_key.add_(1)
        return layer.compute(weights, ids, place)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for _ in range(20):
        for fixed, drawn in zip((weights, ids), layer.route(2), strict=True):
            fixed.copy_(drawn)
        graph.replay()
        assert int(state.shortfall) == 0
        assert torch.equal(output, layer.compute(weights, ids))


# ------------------------------------------------------------------------------------ the copiers


def test_copiers_bring_experts_on_real_streams() -> None:
    import numpy as np

    from sglmoe.memory.device_transfer import DeviceCopier, StreamCopier
    from sglmoe.memory.experts import Load
    from sglmoe.memory.host_tier import HostTier
    from sglmoe.memory.promotion import Promotion
    from sglmoe.memory.store import PARTS, ExpertStore

    store, part_bytes = ExpertStore(), 3 * 2**20
    for expert in range(6):
        for part in PARTS:
            store.put(0, expert, part, np.full(part_bytes, expert + 1, np.uint8))
    tier_blocks = np.empty((2, 3 * part_bytes), np.uint8)
    page_lock(tier_blocks)
    tier = HostTier(tier_blocks, num_layers=1, num_experts=6)
    for expert in (0, 1):
        block = tier.begin(Promotion(0, expert))
        tier.finish(block, store.read(0, expert, tier_blocks[block]))
    arena = torch.zeros(6 * 3 * part_bytes, dtype=torch.uint8, device=DEVICE)
    arguments = {"frame_bytes": 3 * part_bytes, "store": store, "tier": tier}
    demand, prefetch = DeviceCopier(arena, **arguments), StreamCopier(arena, **arguments)
    for expert in range(3):  # the third comes from the store
        prefetch.copy(Load(expert, 0, expert), prefetch.mark(), lambda: None)
    finish = demand.load([Load(3, 0, 1), Load(4, 0, 4), Load(5, 0, 5)])
    finish()
    frames = arena.view(6, -1)  # read on the compute stream, behind the copies
    low, high = frames.amin(dim=1).tolist(), frames.amax(dim=1).tolist()
    assert low == high == [1, 2, 3, 2, 5, 6]
    assert tier.violations() == []
