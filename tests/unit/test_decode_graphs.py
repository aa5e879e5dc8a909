"""Which decode steps SGLang's flags have captured, and what that takes of the budget."""

import pytest

from sglmoe.decode_graphs import (
    GraphFlags,
    captured_rows,
    check_graphs,
    default_max_rows,
    graph_bytes,
)

MIB = 2**20


def test_a_row_takes_its_share_its_logits_twice_and_a_context_of_ids() -> None:
    """32 rows of Qwen3-30B-A3B: 64 MiB, 37 of logits, 10 of ids."""
    taken_bytes = graph_bytes(32, context_tokens=40_960, vocab_size=151_936)
    assert taken_bytes == 64 * MIB + 32 * 8 * 151_936 + 32 * 8 * 40_960


@pytest.mark.parametrize("backend", ["breakable", "full"])
@pytest.mark.parametrize(
    ("sizes", "max_size", "max_running", "rows"),
    [
        ((), None, None, 32),
        ((), None, 5, 5),
        ((), None, 100, 32),
        ((), 8, None, 8),
        ((), 64, 40, 40),
        ((1, 12, 4), 64, None, 12),  # sizes go before the largest size, in SGLang too
        ((512,), None, None, 256),  # no more run where nothing is said
    ],
)
def test_steps_are_captured_up_to_what_flags_say_and_may_run(
    backend: str, sizes: tuple[int, ...], max_size: int | None, max_running: int | None, rows: int
) -> None:
    assert captured_rows(GraphFlags(backend, sizes, max_size), max_running) == rows


@pytest.mark.parametrize("backend", [None, "disabled"])
def test_nothing_is_captured_unless_a_backend_is_named(backend: str | None) -> None:
    assert captured_rows(GraphFlags(backend, (1, 2)), None) == 0
    assert graph_bytes(0, context_tokens=40_960, vocab_size=151_936) == 0


def test_a_server_captures_what_its_plan_counts_where_no_flag_says_how_much() -> None:
    for max_running in (None, 1, 32, 33):
        rows = default_max_rows(max_running)
        assert captured_rows(GraphFlags("breakable"), max_running) == rows
        assert captured_rows(GraphFlags("breakable", max_size=rows), max_running) == rows


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (GraphFlags(sizes=(1, 2)), "--cuda-graph-bs-decode is about"),
        (GraphFlags("disabled", max_size=8), "--cuda-graph-max-bs-decode is about"),
        (GraphFlags(no_padding=True), "--disable-cuda-graph-padding is about"),
    ],
)
def test_sizes_of_nothing_are_refused(flags: GraphFlags, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_graphs(flags, on_gpu=True)


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(ValueError, match="there is no CUDA device"):
        check_graphs(GraphFlags("breakable"), on_gpu=False)
    check_graphs(GraphFlags("breakable", sizes=(1, 2)), on_gpu=True)
    check_graphs(GraphFlags("disabled"), on_gpu=False)
