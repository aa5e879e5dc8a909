"""What the benchmarks ask: the shifting workload comes back to the prefixes it began with."""

import json
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import pytest

from eval import workloads
from eval.servers import OURS, UNMODIFIED
from eval.serving import default_concurrency, read_specs
from eval.workloads import LONG, LONG_AGAIN, SHORT, all_domains, ask_each, read_workload

OPTIONS = Namespace(
    workload="shifting",
    model_path="",
    prefixes=2,
    prefix_tokens=16,
    questions_per_prefix=3,
    long_output_len=4,
    short_prompts=5,
    output_len=8,
    prompts_per_client=3,
)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes A and B, questions q0, q1, ..., without reading this machine's text."""
    monkeypatch.setattr(workloads, "text_windows", lambda model, count, tokens: ["A", "B"][:count])
    monkeypatch.setattr(workloads, "all_domains", lambda count: [f"q{i}" for i in range(count)])


def prompts(path: Path) -> list[str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["conversations"][0]["content"] for line in lines]


@pytest.mark.usefixtures("texts")
def test_a_shifting_workload_returns_to_its_prefixes_with_other_questions(tmp_path: Path) -> None:
    first, middle, last = read_workload(OPTIONS, tmp_path)(8)
    assert [first.name, middle.name, last.name] == [LONG, SHORT, LONG_AGAIN]
    asked = [prompts(phase.settings["dataset-path"]) for phase in (first, middle, last)]
    assert asked[0] == ["A\n\nq0", "B\n\nq1", "A\n\nq2", "B\n\nq3", "A\n\nq4", "B\n\nq5"]
    assert asked[2] == ["A\n\nq6", "B\n\nq7", "A\n\nq8", "B\n\nq9", "A\n\nq10", "B\n\nq11"]
    assert asked[1] == ["q12", "q13", "q14", "q15", "q16"]


@pytest.mark.usefixtures("texts")
def test_every_prompt_of_a_phase_is_asked_at_any_concurrency(tmp_path: Path) -> None:
    """The benchmark takes the first num-prompts of a shuffle: fewer, and rounds would differ."""
    phases_of = read_workload(OPTIONS, tmp_path)
    assert phases_of(1) == phases_of(64)
    for phase, length in zip(phases_of(8), (4, 8, 4), strict=True):
        assert phase.settings["num-prompts"] == len(prompts(phase.settings["dataset-path"]))
        assert phase.settings["sharegpt-output-len"] == length


def test_questions_go_round_the_prefixes() -> None:
    assert ask_each(["A", "B"], ["1", "2", "3"]) == ["A\n\n1", "B\n\n2", "A\n\n3"]


def test_text_comes_from_all_domains_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    by_domain = {name: [f"{name}{i}" for i in range(2)] for name in "wxyz"}
    monkeypatch.setattr(workloads, "prompts_by_domain", lambda count: by_domain)
    assert all_domains(6) == ["w0", "x0", "y0", "z0", "w1", "x1"]


class Letters:
    """A tokenizer: one letter, one token."""

    def encode(self, text: str) -> list[str]:
        return list(text)

    def decode(self, ids: list[str]) -> str:
        return "".join(ids)


def test_prefixes_are_pieces_of_text_that_do_not_overlap() -> None:
    text = "abcdefghijklmnop"
    pieces = workloads.cut_windows(text, Letters(), count=3, num_tokens=5)
    assert sorted(pieces) == ["abcde", "fghij", "klmno"]
    assert all(a[0] != b[0] for a, b in pairwise(pieces))
    with pytest.raises(ValueError, match="16 tokens, 20 are wanted"):
        workloads.cut_windows(text, Letters(), count=4, num_tokens=5)


def test_a_workload_of_one_phase_grows_with_the_concurrency(tmp_path: Path) -> None:
    options = Namespace(**vars(OPTIONS) | {"workload": "random", "input_len": 64})
    (phase,) = read_workload(options, tmp_path)(8)
    assert phase.settings["num-prompts"] == 24


# ------------------------------------------------------------------------------------------- systems


def test_a_system_may_name_its_policy() -> None:
    options = Namespace(
        budgets=None, systems="unmodified,sglmoe@50%:--memory-policy=static=40%;--x=1,sglmoe@9MB"
    )
    theirs, static, default = read_specs(options)
    assert (theirs.module, theirs.budget, theirs.policy) == (UNMODIFIED, "", "")
    assert (static.module, static.budget, static.policy) == (OURS, "50%", "static=40% --x=1")
    assert static.flags == ["--memory-policy=static=40%", "--x=1"]
    assert (default.budget, default.policy) == ("9MB", "cost-aware")


def test_budgets_and_policies_stand_for_all_pairs_by_budget() -> None:
    options = Namespace(budgets="25%,50%", policies="lru,static=40%", systems="unmodified")
    pairs = [(spec.budget, spec.policy) for spec in read_specs(options)]
    assert pairs == [("25%", "lru"), ("25%", "static=40%"), ("50%", "lru"), ("50%", "static=40%")]
    with pytest.raises(SystemExit, match="neither unmodified nor"):
        read_specs(Namespace(budgets=None, systems="vllm"))


def test_64_at_a_time_is_for_machines_that_are_busy_with_it() -> None:
    assert default_concurrency("text", has_accelerator=True) == "1,8,32,64"
    assert default_concurrency("text", has_accelerator=False) == "1,8,32"
    assert default_concurrency("shifting", has_accelerator=True) == "8"
