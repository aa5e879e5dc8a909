"""The command line, as far as it can be read without sglang."""

import socket
from types import SimpleNamespace

import pytest

from sglmoe.config import EngineConfig, Options
from sglmoe.decode_graphs import GraphFlags
from sglmoe.launch_server import check_address, plan_of, read_options
from sglmoe.plan import at_start
from sglmoe.plan.server_flags import ServerFlags


def test_our_flags_are_found_among_sglangs() -> None:
    argv = ["--port", "1", "--memory-budget", "2GiB", "--tp", "1", "--host-memory=50%"]
    argv += ["--memory-planner=off", "--expert-prefetch=on", "--expert-predictor", "pregate"]
    argv += ["--fill-passes=on", "--ttft-target", "2.5", "--itl-target=.1"]
    argv += ["--shutdown-timeout=5", "--expert-affinity=on"]
    argv += ["--packed-experts=./packed", "--packed-share", "auto"]
    expected = Options(
        memory_budget="2GiB",
        host_memory="50%",
        memory_planner="off",
        expert_prefetch="on",
        expert_predictor="pregate",
        fill_passes="on",
        expert_affinity="on",
        ttft_target="2.5",
        itl_target=".1",
        shutdown_timeout="5",
        packed_experts="./packed",
        packed_share="auto",
    )
    assert read_options(argv) == expected


def test_a_server_plans_by_the_flags_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page size and packed experts are in our config: SGLang's side is not told of them."""
    monkeypatch.setattr(at_start, "start_report", lambda config, **asked: str(asked["flags"]))
    given = SimpleNamespace(
        model_path="its",
        dtype="half",
        device="cuda",
        base_gpu_id=0,
        max_running_requests=2,
        context_length=100,
        cuda_graph_backend_decode="breakable",
        cuda_graph_bs_decode=[1, 2],
        cuda_graph_max_bs_decode=8,
        disable_cuda_graph_padding=True,
    )
    config = EngineConfig(
        memory_budget_bytes=1, host_memory_bytes=0, page_tokens=4, packed_experts="off"
    )
    expected = ServerFlags(
        dtype="half",
        page_size=4,
        max_running_requests=2,
        context_length=100,
        graphs=GraphFlags("breakable", (1, 2), 8, no_padding=True),
        packed_experts="off",
    )
    assert plan_of(given, config) == str(expected)


def test_abbreviations_are_left_to_sglang() -> None:
    """`--mem-fraction-static` must not become a budget."""
    assert read_options(["--mem-fraction-static", "0.8", "--mem", "1"]) == Options()


@pytest.mark.parametrize(
    "argv",
    [
        ["--memory-budget", "lots"],
        ["--memory-budget"],
        ["--host-memory", "0%"],
        ["--memory-planner", "perhaps"],
        ["--expert-prefetch", "perhaps"],
        ["--expert-predictor", ""],
        ["--fill-passes", "perhaps"],
        ["--ttft-target", "soon", "--fill-passes", "on"],
        ["--ttft-target", "1"],
        ["--expert-affinity", "auto"],
        ["--itl-target", "0"],
        ["--itl-target", "inf"],
        ["--shutdown-timeout", "soon"],
        ["--shutdown-timeout", "-1"],
        ["--packed-experts", "perhaps"],
        ["--packed-share", "half"],
    ],
)
def test_nonsense_is_refused_by_flag_before_anything_starts(argv: list[str]) -> None:
    with pytest.raises(ValueError, match=argv[0]):
        read_options(argv)


def test_a_port_that_is_taken_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=f"port {port} of 127.0.0.1 .* already in use; .*--port"
        ):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)
    check_address("localhost", port)


def test_a_host_that_is_another_machine_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"192\.0\.2\.1 can not be listened to: .*--host"):
        check_address("192.0.2.1", 0)
