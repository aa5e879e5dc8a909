"""The budget that a machine gives and an operator asks for."""

import pytest

from sglmoe.config import (
    EngineConfig,
    Machine,
    MemoryPolicy,
    Options,
    PrefetchMode,
    parse_expert_predictor,
    parse_expert_prefetch,
    parse_memory_planner,
    parse_memory_policy,
    parse_packed_experts,
    parse_packed_share,
    parse_ttft_target,
    plan_config,
)

CPU = Machine(device_bytes=1000, free_device_bytes=1000, host_bytes=1000, has_gpu=False)
GPU = Machine(device_bytes=1000, free_device_bytes=800, host_bytes=5000, has_gpu=True)


def test_on_a_cpu_half_of_the_memory_is_the_budget_and_there_is_no_tier_beside_it() -> None:
    config = plan_config(Options(), CPU, page_tokens=None)
    assert config == EngineConfig(memory_budget_bytes=500, host_memory_bytes=0, page_tokens=None)


def test_on_a_gpu_the_budget_is_a_share_of_what_is_free() -> None:
    config = plan_config(Options(), GPU, page_tokens=16)
    assert config == EngineConfig(memory_budget_bytes=680, host_memory_bytes=3500, page_tokens=16)


def test_shares_that_are_asked_for_are_of_the_whole_device() -> None:
    config = plan_config(Options(memory_budget="50%", host_memory="1k"), GPU, page_tokens=None)
    assert (config.memory_budget_bytes, config.host_memory_bytes) == (500, 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(memory_budget="2k"), "--memory-budget: 2k is more than the 1000 B"),
        (Options(memory_budget="much"), "--memory-budget: 'much' is not a size"),
        (Options(host_memory="6k"), "--host-memory: 6k is more than the 4.88 KiB"),
    ],
)
def test_what_the_machine_has_not_got_is_refused_by_flag(options: Options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_config(options, GPU, page_tokens=None)


def test_host_memory_on_a_cpu_is_beside_the_budget() -> None:
    config = plan_config(Options(memory_budget="600", host_memory="40%"), CPU, page_tokens=None)
    assert (config.memory_budget_bytes, config.host_memory_bytes) == (600, 400)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            Options(memory_budget="601", host_memory="400"),
            "--memory-budget of 601 B and --host-memory of 400 B together are more than the 1000 B",
        ),
        (Options(host_memory="501"), r"--memory-budget of 500 B \(the default\) and --host-memory"),
        (Options(host_memory="2k"), "--host-memory: 2k is more than the 1000 B"),
    ],
)
def test_on_a_cpu_both_come_out_of_the_same_memory(options: Options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_config(options, CPU, page_tokens=None)


def test_beside_a_gpu_each_has_its_own_memory() -> None:
    config = plan_config(Options(memory_budget="1000", host_memory="5000"), GPU, page_tokens=None)
    assert (config.memory_budget_bytes, config.host_memory_bytes) == (1000, 5000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, (MemoryPolicy.COST_AWARE, 0)),
        ("lru", (MemoryPolicy.LRU, 0)),
        ("static=62.5%", (MemoryPolicy.STATIC, 0.625)),
    ],
)
def test_memory_policy(text: str | None, expected: tuple[MemoryPolicy, float]) -> None:
    assert parse_memory_policy(text) == expected


@pytest.mark.parametrize("text", ["mru", "static", "static=", "static=100%", "static=x", "lru=5%"])
def test_a_policy_that_there_is_not_is_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(ValueError, match=r"--memory-policy: '.*' is n"):
        parse_memory_policy(text)


def test_prefetch_modes() -> None:
    assert parse_expert_prefetch(None) is PrefetchMode.OFF
    assert parse_expert_prefetch("observe") is PrefetchMode.OBSERVE
    with pytest.raises(ValueError, match="--expert-prefetch: 'yes' is none of off, observe, on"):
        parse_expert_prefetch("yes")
    config = plan_config(Options(expert_prefetch="on"), CPU, page_tokens=None)
    assert config.expert_prefetch is PrefetchMode.ON
    assert config.expert_predictor == "auto"
    with pytest.raises(ValueError, match="--expert-predictor: '' is none of auto, last_step"):
        parse_expert_predictor("")


def test_the_planner_is_on_unless_switched_off() -> None:
    assert parse_memory_planner(None)
    assert parse_memory_planner("on")
    assert not parse_memory_planner("off")
    config = plan_config(Options(memory_planner="off"), CPU, page_tokens=None)
    assert not config.memory_planner
    with pytest.raises(ValueError, match="--memory-planner: 'maybe' is none of on, off"):
        parse_memory_planner("maybe")


def test_passes_are_filled_if_asked_for_and_targets_are_seconds() -> None:
    options = Options(fill_passes="on", ttft_target="2", itl_target="0.05")
    config = plan_config(options, CPU, page_tokens=None)
    assert config.fill_passes
    assert (config.ttft_target_seconds, config.itl_target_seconds) == (2.0, 0.05)
    config = plan_config(Options(), CPU, page_tokens=None)
    assert not config.fill_passes
    assert (config.ttft_target_seconds, config.itl_target_seconds) == (None, None)


def test_who_is_admitted_next_follows_the_queue_unless_asked_for() -> None:
    assert not plan_config(Options(), CPU, page_tokens=None).expert_affinity
    assert plan_config(Options(expert_affinity="on"), CPU, page_tokens=None).expert_affinity


def test_a_target_that_would_bound_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--ttft-target bounds how long .* add that, or"):
        parse_ttft_target("2", None)


def test_packed_experts_are_used_where_there_are_any_unless_told_otherwise() -> None:
    assert plan_config(Options(), CPU, page_tokens=None).packed_experts == "auto"
    config = plan_config(Options(packed_experts="off"), CPU, page_tokens=None)
    assert config.packed_experts == "off"
    assert parse_packed_experts("on") == "on"
    assert parse_packed_experts("disk/packed") == "disk/packed"
    with pytest.raises(
        ValueError, match=r"'disk' is none of off, on, auto, and no folder; write ./disk"
    ):
        parse_packed_experts("disk")


def test_the_packed_share_is_off_planned_or_fixed() -> None:
    assert plan_config(Options(), CPU, page_tokens=None).packed_share == 0.0
    assert [parse_packed_share(text) for text in ("off", "auto", "30%", "0.5%")] == [
        0.0,
        None,
        0.3,
        0.005,
    ]
    config = plan_config(Options(packed_share="auto"), CPU, page_tokens=None)
    assert config.packed_share is None


@pytest.mark.parametrize("text", ["30", "0%", "100%", "some", "-5%", ""])
def test_other_packed_shares_mean_nothing(text: str) -> None:
    with pytest.raises(ValueError, match=f"--packed-share: '{text}' is none of off, auto and a"):
        parse_packed_share(text)


@pytest.mark.parametrize("text", ["auto", "30%"])
def test_a_packed_share_is_refused_where_nothing_has_a_value(text: str) -> None:
    assert plan_config(Options(packed_share=text), GPU, page_tokens=None).packed_share != 0.0
    options = Options(packed_share=text, memory_policy="lru")
    with pytest.raises(ValueError, match=f"--packed-share={text}: with --memory-policy=lru "):
        plan_config(options, CPU, page_tokens=None)
    options = Options(packed_share="off", memory_policy="lru")
    assert plan_config(options, GPU, page_tokens=None).packed_share == 0.0
