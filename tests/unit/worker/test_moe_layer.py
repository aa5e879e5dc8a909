"""A layer's output has the same bits whichever frames its experts are in, in any number of waves."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from int4_packing import Int4Weights, quantise
from torch.nn import functional as F

from sglmoe.config import MemoryPolicy
from sglmoe.memory.arena import Geometry, plan_geometry
from sglmoe.memory.background_copier import BackgroundCopier
from sglmoe.memory.expert_layout import W4A16, BlockFp8, ExpertFormat, ExpertLayout, Plain
from sglmoe.memory.link_gate import LinkGate
from sglmoe.memory.manager import MemoryManager
from sglmoe.memory.prefetch import Wanted
from sglmoe.memory.store import PARTS, ExpertStore
from sglmoe.memory.transfer import HostCopier
from sglmoe.worker.moe_layer import ExpertShape, PagedExperts, as_bytes, expert_bounds
from sglmoe.worker.routed import Routed

NUM_EXPERTS, TOP_K, HIDDEN, INNER = 8, 3, 16, 8
PLAIN, FP8 = Plain("bfloat16"), BlockFp8(4, 4)
GPTQ, AWQ = W4A16("bfloat16", 8, False, "gptq"), W4A16("bfloat16", 8, True, "awq")
SHAPE = ExpertShape(NUM_EXPERTS, HIDDEN, INNER, PLAIN)
EXPERT_BYTES = SHAPE.layout.num_bytes


def random_parts(
    its: ExpertFormat, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """Of one expert, by the names of a checkpoint's tensors."""
    layout = ExpertShape(NUM_EXPERTS, HIDDEN, INNER, its).layout
    if not isinstance(its, W4A16):
        yield from ((part, random_part(layout, part, generator)) for part in layout.part_offsets())
        return
    for matrix, weights in int4_weights(its, generator).items():
        tensors = weights.in_gptq() if its.source == "gptq" else weights.in_awq()
        names = {what: f"{matrix}_{what}" for what in tensors}
        yield from ((names[what], its) for what, its in tensors.items() if what != "g_idx")


def int4_weights(its: W4A16, generator: torch.Generator) -> dict[str, Int4Weights]:
    """Of one expert; scales in float16, as checkpoints have them."""
    shapes = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
    return {
        matrix: quantise(
            torch.randn(shape, generator=generator),
            its.group,
            has_zeros=its.has_zeros,
            dtype=torch.float16,
        )
        for matrix, shape in shapes.items()
    }


def random_part(layout: ExpertLayout, part: str, generator: torch.Generator) -> torch.Tensor:
    """As a checkpoint has it: scales, which are positive, in bfloat16, as Qwen's has."""
    tensor = layout.tensor_of(part)
    values = torch.randn(tensor.part_shape, generator=generator)
    if "scale" in part:
        return (values.abs() + 0.5).bfloat16()
    return values.to(getattr(torch, tensor.dtype))


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x[..., :INNER]) * x[..., INNER:]


def make_experts(
    num_frames: int,
    *,
    small_bytes: int = 2**20,
    prefetches: bool = False,
    its: ExpertFormat = PLAIN,
) -> tuple[PagedExperts, MemoryManager]:
    """One layer of random experts in an arena of that many frames, one of which is KV's at most.

    What is more than `small_bytes` is read by threads, while residents compute.
    """
    generator = torch.Generator().manual_seed(1)
    experts = PagedExperts(ExpertStore(), on_tensor=lambda: None)
    shape = ExpertShape(NUM_EXPERTS, HIDDEN, INNER, its)
    layer, layout = experts.add_layer(0, shape), shape.layout
    for expert in range(NUM_EXPERTS):
        for part, tensor in random_parts(its, generator):
            if part in layout.part_offsets():
                experts.take_tensor(layer, expert, part, tensor)
    frame_bytes = -(-layout.num_bytes // 256) * 256
    geometry: Geometry = plan_geometry(
        arena_bytes=num_frames * frame_bytes,
        expert_bytes=layout.num_bytes,
        token_bytes=64,
        token_rows=2,
        page_tokens=4,
    )
    arena = torch.zeros(geometry.arena_bytes, dtype=torch.uint8)
    copier = HostCopier(
        arena.numpy(),
        frame_bytes=geometry.frame_bytes,
        store=experts.store,
        num_threads=1,
        small_bytes=small_bytes,
    )
    background = None
    if prefetches:
        demand = LinkGate()
        prefetch = LinkGate(above=demand)
        background = BackgroundCopier(copier.copy_in_background, demand=demand, prefetch=prefetch)
    memory = MemoryManager(
        geometry,
        num_layers=1,
        num_experts=NUM_EXPERTS,
        floor_frames=num_frames - 1,
        load_experts=copier.load,
        policy=MemoryPolicy.COST_AWARE,
        background=background,
    )
    experts.attach(arena, geometry, frame_table=memory.frame_table, waves=memory.waves)
    return experts, memory


def routed_batch(num_tokens: int) -> tuple[Routed, torch.Tensor]:
    """And the weights of its experts."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    weights, ids = scores.topk(TOP_K)
    return Routed(0, ids, scores, hidden), weights


def run(experts: PagedExperts, num_tokens: int) -> torch.Tensor:
    experts.num_tokens = num_tokens
    routing, weights = routed_batch(num_tokens)
    return experts.compute(routing, weights, config=None, activation=silu_and_mul)


@pytest.mark.parametrize("its", [PLAIN, FP8, GPTQ, AWQ], ids=["plain", "fp8", "gptq", "awq"])
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize("num_frames", [2, 3, 5])
def test_few_frames_give_the_bits_of_all_resident(
    num_frames: int, num_tokens: int, its: ExpertFormat
) -> None:
    resident, _ = make_experts(num_frames=9, its=its)
    paged, memory = make_experts(num_frames, its=its)
    assert torch.equal(run(paged, num_tokens), run(resident, num_tokens))
    assert memory.violations() == []
    # Again, now that other experts are resident and the waves run in another order.
    assert torch.equal(run(paged, num_tokens), run(resident, num_tokens))


@pytest.mark.parametrize("num_frames", [3, 5])
def test_experts_that_come_while_others_compute_change_no_bit(num_frames: int) -> None:
    resident, _ = make_experts(num_frames=9)
    paged, memory = make_experts(num_frames, small_bytes=0)
    for _ in range(3):
        assert torch.equal(run(paged, num_tokens=5), run(resident, num_tokens=5))
        assert memory.violations() == []


def padded_batch(num_tokens: int, num_rows: int) -> tuple[Routed, torch.Tensor]:
    """What a captured layer hands over: what pads has no numbers in it, and experts that do not exist."""
    routing, weights = routed_batch(num_tokens)

    def pad(tensor: torch.Tensor, value: float) -> torch.Tensor:
        return F.pad(tensor, (0, 0, 0, num_rows - num_tokens), value=value)

    ids, logits = pad(routing.ids.int(), NUM_EXPERTS + 3), pad(routing.logits, torch.nan)
    return Routed(0, ids, logits, pad(routing.hidden, torch.nan)), pad(weights, 1.0)


@pytest.mark.parametrize("num_rows", [5, 6, 16])
def test_rows_that_pad_a_captured_batch_change_no_bit_and_are_seen_by_nobody(num_rows: int) -> None:
    alone, memory_alone = make_experts(num_frames=5)
    expected = run(alone, num_tokens=5)
    padded, memory = make_experts(num_frames=5)
    seen: list[Routed] = []
    padded.observer = SimpleNamespace(routed=lambda _, its: seen.append(its), look_ahead=int)
    padded.record_routing(True, with_logits=True)
    padded.num_tokens = 5
    routing, weights = padded_batch(5, num_rows)
    output = padded.compute(routing, weights, config=None, activation=silu_and_mul)
    assert torch.equal(output[:5], expected)
    assert torch.equal(output[5:], torch.zeros(num_rows - 5, HIDDEN))
    assert [len(its) for its in (seen[0].ids, seen[0].logits, seen[0].hidden)] == [5, 5, 5]
    chosen, logits = routing.ids[:5].clone(), routing.logits[:5].clone()
    for its in (routing.ids, routing.logits):  # memory of the next segment
        its.zero_()
    ids, probabilities = padded.trace()
    assert torch.equal(ids[:, 0], chosen)
    assert torch.equal(probabilities[:, 0], logits.softmax(dim=-1).half())
    assert np.array_equal(memory.frame_table, memory_alone.frame_table)
    assert memory.snapshot(0).expert_misses == memory_alone.snapshot(0).expert_misses


def test_a_pass_of_nothing_but_padding_pages_no_expert_in() -> None:
    """As SGLang's own are, which try a model out and capture it before anything is served."""
    experts, memory = make_experts(num_frames=5)
    experts.record_routing(True)
    before = memory.snapshot(0)
    routing, weights = padded_batch(0, 5)
    output = experts.compute(routing, weights, config=None, activation=silu_and_mul)
    assert torch.equal(output, torch.zeros(5, HIDDEN))
    assert memory.snapshot(0) == before
    assert experts._routing == {}


class Meddler:
    """Expects and fetches experts at random, between layers and in the middle of them."""

    def __init__(self, memory: MemoryManager):
        self._memory = memory
        self._random = np.random.default_rng(3)

    def routed(self, layer: int, routing: Routed) -> None:
        self._meddle(-1)

    def look_ahead(self) -> None:
        self._meddle(0)

    def _meddle(self, layer: int) -> None:
        self._memory.expect(layer, self._random.random((1, NUM_EXPERTS)))
        wanted = self._random.permutation(NUM_EXPERTS)[:3].tolist()
        self._memory.prefetch(Wanted(0, expert, 0.5) for expert in wanted)


@pytest.mark.parametrize("num_frames", [3, 5])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_predictions_that_mean_nothing_change_no_bit(num_frames: int, num_tokens: int) -> None:
    resident, _ = make_experts(num_frames=9)
    paged, memory = make_experts(num_frames, prefetches=True)
    paged.observer = Meddler(memory)
    for _ in range(10):
        memory.begin_step()
        assert torch.equal(run(paged, num_tokens), run(resident, num_tokens))
        assert memory.violations() == []
    snapshot = memory.snapshot(0)
    num_ended = snapshot.prefetches_used + snapshot.prefetches_late + snapshot.prefetches_wasted
    assert snapshot.prefetches_begun >= num_ended > 1


def test_eight_experts_over_three_frames_take_three_waves() -> None:
    experts, memory = make_experts(num_frames=3)
    run(experts, num_tokens=40)
    assert memory.snapshot(0).num_waves == 3


def test_an_output_is_the_weighted_sum_of_its_experts() -> None:
    experts, _ = make_experts(num_frames=9)
    output = run(experts, num_tokens=1)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(1, HIDDEN, generator=generator).bfloat16()
    weights, ids = torch.rand(1, NUM_EXPERTS, generator=generator).topk(TOP_K)
    expected = torch.zeros(1, HIDDEN)
    for weight, expert in zip(weights[0].tolist(), ids[0].tolist(), strict=True):
        w1, w3, w2 = matrices(experts, expert)
        expected += weight * F.linear(F.silu(F.linear(hidden, w1)) * F.linear(hidden, w3), w2)
    assert torch.allclose(output.float(), expected, rtol=0.05, atol=0.05)


def matrices(experts: PagedExperts, expert: int) -> Iterator[torch.Tensor]:
    for part, (_, raw) in zip(PARTS, experts.store.parts(0, expert), strict=True):
        assert isinstance(raw, np.ndarray)
        shape = SHAPE.layout.tensor_of(part).part_shape
        yield torch.from_numpy(raw).view(torch.bfloat16).view(shape)


def test_fp8_experts_have_the_bits_of_plain_ones_with_the_weights_that_they_stand_for() -> None:
    """On a CPU. Every weight is written out here, one by one, and rounded to bfloat16."""
    in_fp8, _ = make_experts(num_frames=3, its=FP8)
    plain, memory = make_experts(num_frames=9)
    assert in_fp8.layout is not None
    for expert in range(NUM_EXPERTS):
        arrays = dict(zip(in_fp8.store.part_names, in_fp8.store.parts(0, expert), strict=True))
        for part in PARTS:
            raw, scales = (arrays[name][1] for name in (part, f"{part}_weight_scale_inv"))
            assert isinstance(raw, np.ndarray)
            assert isinstance(scales, np.ndarray)
            height, width = SHAPE.layout.tensor_of(part).part_shape
            weight = torch.from_numpy(raw).view(torch.float8_e4m3fn).float().view(height, width)
            scale = torch.from_numpy(scales).view(torch.float32).view(height // 4, width // 4)
            whole = [
                [float(weight[n, k] * scale[n // 4, k // 4]) for k in range(width)]
                for n in range(height)
            ]
            plain.store._parts[0, expert, part] = as_bytes(torch.tensor(whole).bfloat16())
    assert torch.equal(run(in_fp8, num_tokens=5), run(plain, num_tokens=5))
    assert memory.violations() == []


@pytest.mark.parametrize("its", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_int4_experts_have_the_bits_of_plain_ones_with_the_weights_that_they_stand_for(
    its: W4A16,
) -> None:
    """On a CPU, and converted from the checkpoint's form on the way."""
    in_int4, memory = make_experts(num_frames=3, its=its)
    plain, _ = make_experts(num_frames=9)
    generator = torch.Generator().manual_seed(1)
    for expert in range(NUM_EXPERTS):
        for matrix, weights in int4_weights(its, generator).items():
            plain.store._parts[0, expert, matrix] = as_bytes(weights.whole(torch.bfloat16))
    assert torch.equal(run(in_int4, num_tokens=5), run(plain, num_tokens=5))
    assert memory.violations() == []


def test_int4_tensors_of_another_form_are_refused_by_name() -> None:
    """Rows of words and of weights in 8 bits; words that are floats; scales of other groups."""
    experts = PagedExperts(ExpertStore(), on_tensor=lambda: None)
    experts.add_layer(0, ExpertShape(NUM_EXPERTS, HIDDEN, INNER, GPTQ))
    refused = {
        "w1_qweight": (torch.zeros(HIDDEN // 4, INNER, dtype=torch.int32), r"\(4, 8\) in int32"),
        "w3_qweight": (torch.zeros(HIDDEN // 8, INNER), r"\(2, 8\) in float32"),
        "w2_scales": (torch.zeros(2, HIDDEN), r"\(2, 16\) in float32"),
    }
    for part, (tensor, shown) in refused.items():
        with pytest.raises(ValueError, match=rf"{part} has shape {shown} in the checkpoint"):
            experts.take_tensor(0, 0, part, tensor)
    experts.take_tensor(0, 0, "w2_scales", torch.zeros(1, HIDDEN))


def test_rows_are_grouped_by_expert_in_ascending_order() -> None:
    ids = torch.tensor([[5, 1], [1, 0], [5, 7]])
    assert expert_bounds(ids) == {0: (0, 1), 1: (1, 3), 5: (3, 5), 7: (5, 6)}


def test_recorded_routing_has_zeros_for_layers_without_experts() -> None:
    experts = PagedExperts(ExpertStore(), on_tensor=lambda: None)
    experts.add_layer(1, SHAPE)  # layer 0 is dense, as in DeepSeek
    experts.record_routing(True)
    experts._routing = {0: torch.tensor([[3, 2, 1]], dtype=torch.int32)}
    assert experts.routing(num_layers=3).tolist() == [[[0, 0, 0], [3, 2, 1], [0, 0, 0]]]


def test_a_matrix_of_another_shape_is_refused_by_name() -> None:
    experts = PagedExperts(ExpertStore(), on_tensor=lambda: None)
    experts.add_layer(0, SHAPE)
    with pytest.raises(ValueError, match=r"expert 3 of MoE layer 0: w2 has shape \(2, 2\)"):
        experts.take_tensor(0, 3, "w2", torch.zeros(2, 2))


def test_an_inner_size_that_sglang_rounds_up_is_filled_up_with_zeros() -> None:
    # On a CPU it does so to multiples of 32; here of 4: an inner size of INNER - 3 becomes INNER.
    experts = PagedExperts(ExpertStore(), on_tensor=lambda: None, inner_multiple=4)
    experts.add_layer(0, SHAPE)
    for part, given in (("w1", (INNER - 3, HIDDEN)), ("w2", (HIDDEN, INNER - 3))):
        experts.take_tensor(0, 3, part, torch.ones(given, dtype=torch.bfloat16))
    experts.take_tensor(0, 3, "w3", torch.zeros(INNER, HIDDEN, dtype=torch.bfloat16))
    frame = torch.zeros(EXPERT_BYTES, dtype=torch.uint8)
    experts.store.read(0, 3, frame.numpy())
    w1, _, w2 = frame.view(torch.bfloat16).split(INNER * HIDDEN)
    assert w1.tolist() == [1.0] * (INNER - 3) * HIDDEN + [0.0] * 3 * HIDDEN
    assert w2.tolist() == ([1.0] * (INNER - 3) + [0.0] * 3) * HIDDEN
    with pytest.raises(ValueError, match=r"w2 has shape"):
        experts.take_tensor(0, 4, "w2", torch.ones(HIDDEN, INNER - 4, dtype=torch.bfloat16))


def test_scales_are_never_filled_up() -> None:
    """Of gates of 8 rows in blocks of 4 there are two rows; a CPU's multiple of 32 is none of theirs."""
    experts = PagedExperts(ExpertStore(), on_tensor=lambda: None, inner_multiple=32)
    experts.add_layer(0, ExpertShape(NUM_EXPERTS, HIDDEN, INNER, FP8))
    experts.take_tensor(0, 0, "w1_weight_scale_inv", torch.ones(2, 4))
    assert experts.store.total_bytes == 2 * 4 * 4
    with pytest.raises(ValueError, match=r"w3_weight_scale_inv has shape \(2, 3\)"):
        experts.take_tensor(0, 0, "w3_weight_scale_inv", torch.ones(2, 3))


def test_layers_with_different_experts_are_refused() -> None:
    experts = PagedExperts(ExpertStore(), on_tensor=lambda: None)
    experts.add_layer(0, SHAPE)
    with pytest.raises(ValueError, match="differ from layer to layer"):
        experts.add_layer(1, ExpertShape(NUM_EXPERTS, HIDDEN, 2 * INNER, PLAIN))
    with pytest.raises(ValueError, match="differ from layer to layer"):
        experts.add_layer(1, ExpertShape(NUM_EXPERTS, HIDDEN, INNER, FP8))


def test_counters_are_told_what_a_layer_uses_before_it_waits_for_it() -> None:
    experts, memory = make_experts(num_frames=3)
    told: list[list[int]] = []
    counter = SimpleNamespace(note=lambda layer, its: told.append([layer, *its.tolist()]))
    experts.counters = [counter]  # type: ignore[list-item]
    run(experts, num_tokens=5)
    routing, _ = routed_batch(5)
    assert told == [[0, *routing.ids.unique().tolist()]]
    assert memory.snapshot(0).num_waves > 1
