"""Who is compared with whom on a GPU, and with how much memory: `eval.decode_speed`, for Qwen3-30B-A3B's shapes."""

import argparse
from pathlib import Path

import pytest

from eval.decode_speed import (
    KV_TOKENS,
    MOST_REQUESTS,
    Contestant,
    contestants,
    figures_of,
    ratios,
    rehearsal,
)
from eval.shaped_model import Shape, add_arguments, config_of, write
from sglmoe.decode_graphs import graph_bytes
from sglmoe.memory.arena import plan_geometry
from sglmoe.plan.model_shape import ModelShape, read_model

SHAPE = ModelShape(
    architecture="Qwen3MoeForCausalLM",
    num_layers=12,
    num_moe_layers=12,
    num_experts=128,
    top_k=8,
    hidden_size=2048,
    inner_size=768,
    expert_bytes=3 * 2048 * 768 * 2,
    dense_bytes=1_700_000_000,
    token_bytes=12 * 2 * 4 * 128 * 2,
    token_rows=24,
    context_tokens=4096,
    vocab_size=151936,
    item_bytes=2,
)
EVERYONE = [*contestants(SHAPE, has_packed=True)]


@pytest.mark.parametrize(
    "its", [its for its in EVERYONE if its.is_ours], ids=lambda its: f"{its.name} {its.share}"
)
def test_ours_has_frames_for_the_share_and_for_the_same_kv_and_few_more(its: Contestant) -> None:
    graphs = graph_bytes(MOST_REQUESTS, context_tokens=4096, vocab_size=SHAPE.vocab_size)
    geometry = plan_geometry(
        arena_bytes=int(its.flags["memory_budget"]) - SHAPE.dense_bytes - graphs,
        expert_bytes=SHAPE.expert_bytes,
        token_bytes=SHAPE.token_bytes,
        token_rows=SHAPE.token_rows,
        page_tokens=None,
        has_padding=True,
    )
    share = 12 * 128 * its.share // 100
    beside_kv = geometry.num_frames - geometry.frames_for(KV_TOKENS)
    assert share <= beside_kv <= 1.03 * share + 4
    assert int(its.flags["host_memory"]) >= 12 * 128 * SHAPE.expert_bytes


def test_theirs_has_the_same_share_in_slots_of_each_layer() -> None:
    slots = {its.share: its.flags["paged_experts_num_resident"] for its in named("paged experts")}
    assert slots == {25: 32, 50: 64, 75: 96}
    assert {its.flags["max_total_tokens"] for its in EVERYONE if not its.is_ours} == {KV_TOKENS}
    offloaded = {its.share: its.flags["cpu_offload_gb"] for its in named("cpu offload")}
    assert offloaded == {25: 11, 50: 7, 75: 4}  # of 13.5 GiB


def named(name: str) -> list[Contestant]:
    return [its for its in EVERYONE if its.name == name]


def test_the_most_telling_come_first() -> None:
    assert [(its.name, its.share) for its in EVERYONE[:5]] == [
        ("unmodified", 100),
        ("sglmoe", 100),
        ("paged experts", 50),
        ("sglmoe", 50),
        ("sglmoe, packed", 50),
    ]
    assert not any("packed" in its.name for its in contestants(SHAPE, has_packed=False))
    assert all("cuda_graph_backend_decode" not in its.flags for its in rehearsal(SHAPE))


def test_ratios_are_over_those_of_the_same_share_and_batch() -> None:
    figures = [
        {"name": name, "share": share, "batch": batch, "tokens_per_second": speed}
        for name, share, batch, speed in [
            ("paged experts", 50, 1, 40.0),
            ("cpu offload", 50, 1, 5.0),
            ("paged experts", 50, 4, 60.0),
            ("sglmoe", 50, 1, 60.0),
            ("sglmoe, packed", 50, 4, 150.0),
            ("sglmoe", 75, 1, 99.0),
        ]
    ]
    assert [
        (its["engine"], its["over"], its["batch"], its["ratio"]) for its in ratios(figures)
    ] == [
        ("sglmoe", "paged experts", 1, 1.5),
        ("sglmoe", "cpu offload", 1, 12.0),
        ("sglmoe, packed", "paged experts", 4, 2.5),
    ]


def test_what_a_process_has_said_counts_though_it_fails(capsys: pytest.CaptureFixture[str]) -> None:
    said = "echo loading; echo 'FIGURE {\"batch\": 1}'; echo out of memory; exit 3"
    assert [*figures_of(["sh", "-c", said], 10)] == [{"batch": 1}]
    assert "status 3: loading\nout of memory" in capsys.readouterr().out


def test_one_that_hangs_is_ended(capsys: pytest.CaptureFixture[str]) -> None:
    assert [*figures_of(["sh", "-c", "sleep 60"], 1)] == []
    assert "status 124" in capsys.readouterr().out


def test_a_checkpoint_of_these_shapes_is_read_as_what_it_was_meant_to_be(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    sizes = {"layers": 2, "experts": 4, "top-k": 2, "hidden": 64, "inner": 32, "heads": 4}
    sizes |= {"kv-heads": 2, "head-dim": 16, "vocab": 128}
    flags = [f"--{name}={size}" for name, size in sizes.items()]
    its = parser.parse_args(flags, namespace=Shape(output=tmp_path))
    write(its)
    shape = read_model(str(tmp_path), device="cpu").shape
    assert (shape.num_moe_layers, shape.num_experts, shape.top_k) == (2, 4, 2)
    assert (shape.hidden_size, shape.inner_size, shape.vocab_size) == (64, 32, 128)
    assert shape.expert_bytes == 3 * 64 * 32 * 2
    whole = parser.parse_args([], namespace=Shape(output=tmp_path))
    assert config_of(whole)["num_experts"] == 128
