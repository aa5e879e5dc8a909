"""From a model and a machine to a command, and what an operator is told before it runs."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_model import COSTS, TINY, budget_of

from sglmoe.config import EngineConfig, Machine, MemoryPolicy, Options
from sglmoe.decode_graphs import DecodeGraphs, GraphFlags, graph_bytes
from sglmoe.demo_model import DEMO_MODEL
from sglmoe.launch_server import read_options
from sglmoe.plan.__main__ import main
from sglmoe.plan.at_start import start_report
from sglmoe.plan.budgets import Demand
from sglmoe.plan.launch_plan import LaunchPlan, Question, host_flag, plan_launch, size_flag
from sglmoe.plan.machine_limits import Limits
from sglmoe.plan.model_shape import Model
from sglmoe.plan.report import full_report, short_report
from sglmoe.plan.server_flags import ServerFlags
from sglmoe.units import parse_bytes

GIB = 2**30
GPU = Machine(8 * GIB, 8 * GIB, 16 * GIB, has_gpu=True)
BOX = Machine(16 * GIB, 16 * GIB, 16 * GIB, has_gpu=False)
PADDING = 2**18  # a page: on a GPU the arena begins with one that nobody has
UNLIMITED, USUAL, NO_FLAGS = Limits(), Demand(), ServerFlags()
# 64 experts of 256 MiB: 16 GiB, and a GiB of dense weights.
BIG = msgspec.structs.replace(
    TINY, num_experts=32, expert_bytes=2**28, dense_bytes=GIB, token_bytes=2**14
)


def question(
    machine: Machine = GPU,
    limits: Limits = UNLIMITED,
    demand: Demand = USUAL,
    flags: ServerFlags = NO_FLAGS,
    **options: str,
) -> Question:
    return Question(
        model_path="big",
        shape=BIG,
        machine=machine,
        limits=limits,
        demand=demand,
        costs=COSTS,
        costs_are="made up",
        flags=flags,
        options=Options(**options),
    )


def plan(*args: Any, **options: Any) -> LaunchPlan:
    return plan_launch(question(*args, **options))


def told(the: LaunchPlan) -> str:
    return "\n".join(map(str, the.findings))


def test_the_command_has_the_servers_own_defaults_in_figures() -> None:
    """85 % of the free GPU memory, and 70 % of the host's; rounded down; no more than all experts take."""
    small_host = msgspec.structs.replace(GPU, host_bytes=10 * GIB)
    the = plan(small_host)
    assert " ".join(the.command) == (
        "python -m sglmoe.launch_server --model-path big --memory-budget 6.79GiB --host-memory 7.00GiB"
    )
    assert plan(msgspec.structs.replace(GPU, host_bytes=64 * GIB)).command[-1] == "16.00GiB"


def test_the_plan_is_of_exactly_what_the_command_asks_for() -> None:
    the = plan()
    given = read_options(list(the.command[3:]))
    assert given.memory_budget is not None
    assert parse_bytes(given.memory_budget, whole_bytes=0) == the.chosen.budget_bytes


@pytest.mark.parametrize(
    ("size", "text"),
    [(GIB * 5 // 2, "2.50GiB"), (GIB - 1, "1023.99MiB"), (2**20, "1.00MiB"), (1234, "1234")],
)
def test_sizes_are_rounded_down(size: int, text: str) -> None:
    assert size_flag(size) == text
    assert parse_bytes(text, whole_bytes=0) <= size


@pytest.mark.parametrize(
    ("host", "experts", "text"),
    [
        (8 * GIB, 16 * GIB, "8.00GiB"),
        (16 * GIB, 16 * GIB, "16.00GiB"),
        (17 * GIB, 16 * GIB + 1, "16.01GiB"),  # rounded down, one expert would be missing
        (16 * GIB + 1, 16 * GIB + 1, str(16 * GIB + 1)),
        (GIB, 5_000_000, "4.77MiB"),
    ],
)
def test_host_memory_that_could_hold_all_experts_does(host: int, experts: int, text: str) -> None:
    assert host_flag(host, experts) == text
    assert parse_bytes(text, whole_bytes=0) >= min(host, experts)


def test_a_model_without_experts_asks_for_no_host_memory() -> None:
    dense = msgspec.structs.replace(BIG, num_moe_layers=0, num_experts=0, top_k=0, expert_bytes=0)
    full = ServerFlags(graphs=GraphFlags("full"), context_length=10**6)  # more than KV has room for
    the = plan_launch(msgspec.structs.replace(question(flags=full), shape=dense))
    assert "--host-memory" not in the.command
    assert "full" not in told(the)
    assert "the model has no routed experts" in told(the)


def test_steps_without_the_host_need_all_experts_in_its_memory() -> None:
    full = ServerFlags(graphs=GraphFlags(backend="full"))
    roomy = msgspec.structs.replace(GPU, host_bytes=64 * GIB)
    assert plan(roomy, flags=full).can_start
    the = plan(roomy, flags=full, host_memory="15GiB")
    assert not the.can_start
    assert "raise --host-memory from 15.00 GiB to 16.00 GiB" in told(the)
    breakable = ServerFlags(graphs=GraphFlags(backend="breakable"))
    assert plan(roomy, flags=breakable, host_memory="15GiB").can_start


def test_steps_without_the_host_keep_their_frames_if_a_whole_context_fits_beside_them() -> None:
    """4 frames for 2 layers, and 16,384 tokens to a frame of 256 MiB: 13 frames for 200,000."""
    full = ServerFlags(graphs=GraphFlags(backend="full"), context_length=200_000)
    roomy = msgspec.structs.replace(GPU, host_bytes=64 * GIB)
    beside = GIB + plan(roomy, flags=full).graphs.reserved_bytes + 2**18  # and a padding page
    enough = plan(roomy, flags=full, memory_budget=str(beside + 17 * 2**28))
    assert (enough.chosen.floor_frames, enough.chosen.kv_tokens) == (4, 13 * 16_384)
    assert told(enough) == ""
    less = plan(roomy, flags=full, memory_budget=str(beside + 15 * 2**28))
    assert (less.chosen.floor_frames, less.chosen.kv_tokens) == (2, 13 * 16_384)
    assert less.can_start
    assert "full: 4 frames, which a step without the host takes for one request" in told(less)
    assert "raise --memory-budget by 512.00 MiB, or lower --context-length" in told(less)
    shares = question(roomy, flags=full, memory_budget=str(beside + 15 * 2**28))
    its = plan_launch(msgspec.structs.replace(shares, memory_policy=MemoryPolicy.STATIC))
    assert (its.chosen.floor_frames, told(its)) == (2, "")


def test_what_decoding_packed_experts_takes_is_told() -> None:
    roomy = msgspec.structs.replace(GPU, host_bytes=64 * GIB)
    its = question(roomy, memory_budget=str(6 * GIB + PADDING), host_memory="16GiB")
    its = msgspec.structs.replace(its, stored_bytes=59_652_320)  # there is room for nine
    the = plan_launch(its)
    assert the.chosen.geometry is not None
    assert the.chosen.geometry.num_frames == 18  # of 20
    assert "Decoding packed experts: 512.00 MiB of a budget" in full_report(the)
    assert the.can_start


def test_packed_experts_take_less_time_on_their_way() -> None:
    """A half of their bytes: a plan promises more, though room to decode them leaves fewer frames."""
    roomy = msgspec.structs.replace(GPU, host_bytes=64 * GIB)
    its = question(roomy, memory_budget="6GiB", host_memory="16GiB")
    plain = plan_launch(its)
    packed = plan_launch(msgspec.structs.replace(its, stored_bytes=2**27))
    assert packed.costs.load_seconds == plain.costs.load_seconds / 2
    assert packed.costs.disk_seconds == plain.costs.disk_seconds / 2
    assert packed.chosen.geometry is not None
    assert plain.chosen.geometry is not None
    assert packed.chosen.geometry.num_frames < plain.chosen.geometry.num_frames
    speeds = [the.chosen.forecasts[0].tokens_per_second for the in (packed, plain)]
    assert speeds[0] > speeds[1]


def test_steps_without_the_host_need_all_experts_as_they_are_stored() -> None:
    """64, of 192 MiB instead of 256; 8 are in frames."""
    full = ServerFlags(graphs=GraphFlags(backend="full"))
    roomy = msgspec.structs.replace(GPU, host_bytes=64 * GIB)
    plans = []
    for host_memory in (None, "12GiB", "11GiB"):
        options = {"memory_budget": "5GiB"}
        options |= {} if host_memory is None else {"host_memory": host_memory}
        its = question(roomy, flags=full, **options)
        plans.append(plan_launch(msgspec.structs.replace(its, stored_bytes=3 * 2**26)))
    assert [the.can_start for the in plans] == [True, True, False]
    command = plans[0].command
    assert command[command.index("--host-memory") + 1] == "12.00GiB"
    assert plans[1].chosen.geometry is not None
    assert plans[1].chosen.geometry.num_frames == 8
    assert told(plans[1]) == ""  # no expert is on disk alone
    assert "raise --host-memory from 11.00 GiB to 12.00 GiB" in told(plans[2])


def test_command_and_server_look_for_packed_experts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def stored_bytes(model: Model, wanted: str, device: str) -> int:
        asked.append((model.name, wanted, device))
        return 2**20

    for module in ("__main__", "at_start"):
        monkeypatch.setattr(f"sglmoe.plan.{module}.stored_bytes_of", stored_bytes)
    machine = ["--gpu-memory", "24GiB", "--host-memory", "64GiB"]
    main([*machine, "--packed-experts", "on", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["decoding_bytes"] == 9 * 2**20
    assert said["command"][-2:] == ["--packed-experts", "on"]
    config = EngineConfig(memory_budget_bytes=8 * 10**6, host_memory_bytes=0)
    its = {"flags": ServerFlags(packed_experts="off"), "device": "cpu", "gpu_id": 0}
    said = start_report(config, model_path=str(DEMO_MODEL), **its)
    assert "Decoding packed experts: 9.00 MiB of a budget" in said
    assert asked == [(str(DEMO_MODEL), "on", "cuda"), (str(DEMO_MODEL), "off", "cpu")]


def test_a_plan_without_worries_has_no_findings() -> None:
    the = plan(msgspec.structs.replace(GPU, host_bytes=64 * GIB))
    assert the.can_start
    assert told(the) == ""


def test_paging_that_is_not_needed_is_told() -> None:
    roomy = msgspec.structs.replace(GPU, device_bytes=64 * GIB, free_device_bytes=64 * GIB)
    assert "warning: paging is not needed: all 64 experts fit" in told(plan(roomy))
    # With 32 requests at a time they do not fit.
    budget = str(GIB + 64 * 2**28 + 2**28)
    assert "not needed" not in told(plan(roomy, memory_budget=budget))


def test_experts_that_only_the_disk_holds_are_told() -> None:
    assert "the rest is read from the checkpoint" in told(plan(host_memory="1GiB"))


def test_a_budget_too_small_can_not_start() -> None:
    the = plan(memory_budget="1GiB")
    assert not the.can_start
    assert "raise --memory-budget" in told(the)


def test_a_budget_beyond_what_is_free_can_not_start() -> None:
    busy = msgspec.structs.replace(GPU, free_device_bytes=2 * GIB)
    assert "are free on the device; lower it" in told(plan(busy, memory_budget="4GiB"))


def test_what_the_machine_has_not_got_is_refused_as_by_the_server() -> None:
    with pytest.raises(ValueError, match="--memory-budget: 9GiB is more than the"):
        plan(memory_budget="9GiB")


def test_a_cgroup_without_room_for_the_server_itself_can_not_start() -> None:
    the = plan(BOX, memory_budget="15GiB")
    assert not the.can_start
    assert "problem: --memory-budget and --host-memory together and 2.00 GiB" in told(the)


def test_memory_that_others_use_now_is_a_warning() -> None:
    the = plan(BOX, limits=Limits(available_bytes=4 * GIB), memory_budget="8GiB")
    assert the.can_start
    assert "other programs leave 4.00 GiB now" in told(the)


def test_memlock_matters_beside_a_gpu() -> None:
    limits = Limits(memlock_bytes=8 * 2**20)
    assert "ulimit -l allows 8.00 MiB" in told(plan(limits=limits))
    assert "ulimit -l" not in told(
        plan(BOX, limits=limits, memory_budget="8GiB", host_memory="1GiB")
    )


def test_too_few_addresses_can_not_start() -> None:
    the = plan(limits=Limits(address_space_bytes=4 * GIB))
    assert not the.can_start
    assert "ulimit -v allows 4.00 GiB" in told(the)


def test_a_report_names_what_it_assumes_marks_the_choice_and_ends_in_the_command() -> None:
    the = plan(memory_budget="6GiB")
    lines = full_report(the).splitlines()
    assert any(line.startswith("| 6.00 GiB * |") for line in lines)
    assert any(line.startswith("*: the command's budget; !: ") for line in lines)
    assert any(line.startswith("| 17.") and " ! |" in line for line in lines)  # all experts and KV
    assert "routing as uneven as in the demo model's reference traces" in full_report(the)
    assert "made up" in full_report(the)
    assert "--memory-budget 6GiB" in lines[-1]


def test_a_server_says_it_in_a_few_lines() -> None:
    lines = short_report(
        plan(memory_budget=str(6 * GIB + PADDING), host_memory="16GiB"),
    ).splitlines()
    assert lines[1].startswith("--memory-budget 6.00 GiB: 20 frames of 256.00 MiB for 64 experts")
    assert lines[2].startswith("expected hits at so many requests: ")
    assert len(lines) <= 5


def test_an_explicit_skew_is_said() -> None:
    assert "routing of skew 2.5;" in full_report(plan(demand=Demand(skew=2.5)))


def test_the_smallest_arena_that_works_is_planned() -> None:
    assert plan_launch(
        Question(
            model_path="tiny",
            shape=TINY,
            machine=BOX,
            limits=Limits(),
            demand=Demand(request_tokens=16),
            costs=COSTS,
            costs_are="",
            options=Options(memory_budget=str(budget_of(3))),
        )
    ).can_start


CAPTURED = ServerFlags(max_running_requests=8, context_length=100, graphs=GraphFlags("breakable"))


def test_captured_steps_are_counted_and_told() -> None:
    """Of the 8 requests that may run, each with a context of 100 tokens: less than the 32 that would be captured."""
    the = plan(flags=CAPTURED)
    taken = graph_bytes(8, context_tokens=100, vocab_size=TINY.vocab_size)
    assert the.graphs == DecodeGraphs(8, taken)
    line = "CUDA graphs of decode steps of up to 8 requests: 16.07 MiB of a budget"
    for report in (full_report(the), short_report(the)):
        assert line in report
    assert "CUDA graphs" not in full_report(plan())
    whole = plan(flags=ServerFlags(graphs=GraphFlags("breakable")))
    assert whole.graphs == DecodeGraphs(
        32, graph_bytes(32, context_tokens=TINY.context_tokens, vocab_size=TINY.vocab_size)
    )
    four_frames = str(GIB + 4 * 2**28 + PADDING)
    for flags, num_frames in ((NO_FLAGS, 4), (CAPTURED, 3)):
        geometry = plan(flags=flags, memory_budget=four_frames).chosen.geometry
        assert geometry is not None
        assert geometry.num_frames == num_frames


def test_the_command_takes_the_servers_flags_and_hands_them_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = Path(__file__).parents[3] / "launch" / "models" / "qwen3-30b-a3b.json"
    given = ["--cuda-graph-backend-decode", "breakable", "--cuda-graph-bs-decode", "1", "8"]
    machine = ["--gpu-memory", "24GiB", "--host-memory", "64GiB"]
    arguments = ["--model-path", "nobody/qwen3", "--config-file", str(config), *machine, *given]
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["graphs"]["max_rows"] == 8
    assert said["graphs"]["reserved_bytes"] == 8 * (2 * 2**20 + 8 * 151_936 + 8 * 40_960)
    assert said["command"][-5:] == given


def test_fewer_may_run_where_a_flag_says_so() -> None:
    demand = Demand(concurrency=(1, 32))
    running = [its.num_running for its in plan(demand=demand, flags=CAPTURED).chosen.forecasts]
    assert running == [1, 8]


def test_pages_are_as_large_as_a_flag_says() -> None:
    geometry = plan(flags=ServerFlags(page_size=2)).chosen.geometry
    assert geometry is not None
    assert geometry.page_tokens == 2


def test_graphs_that_a_server_would_refuse_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no CUDA device to capture on"):
        plan(BOX, flags=CAPTURED)
    with pytest.raises(ValueError, match="--cuda-graph-max-bs-decode is about"):
        plan(flags=ServerFlags(graphs=GraphFlags(max_size=8)))


def test_the_page_cache_is_a_tier_only_without_a_gpu() -> None:
    """With 8 GiB and 2 for the server taken of 16, pages of the checkpoint may have 6; so fewer loads are from disk."""
    of_box, of_gpu = (
        plan(machine, memory_budget=str(6 * GIB + padding), host_memory="1GiB")
        for machine, padding in ((BOX, 0), (GPU, PADDING))
    )
    seconds = [the.chosen.forecasts[0].step_seconds for the in (of_box, of_gpu)]
    assert of_box.chosen.forecasts[0].loads == of_gpu.chosen.forecasts[0].loads
    assert seconds[0] < seconds[1]


def test_a_server_on_this_machine_says_its_plan_or_why_there_is_none(tmp_path: Path) -> None:
    config = EngineConfig(memory_budget_bytes=8 * 10**6, host_memory_bytes=0)
    asked = {"flags": NO_FLAGS, "device": "cpu", "gpu_id": 0}
    said = start_report(config, model_path=str(DEMO_MODEL), **asked)
    assert "104 frames of 48.00 KiB for 192 experts and KV" in said  # (8e6 - 2839296) / 49152
    (tmp_path / "config.json").write_text("{}")
    said = start_report(config, model_path=str(tmp_path), **asked)
    assert said.startswith("no plan for ")
