"""README and docs name what exists: links, files, modules, make targets, flags, metrics. Commands run in tests/e2e."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from documents import LANGUAGES, PAGES, ROOT, blocks, code_spans, links, prose

from sglmoe import flags
from sglmoe.protocol import (
    Limits,
    MemorySnapshot,
    PackedReport,
    PrefetchReport,
    ResidencyPlan,
    StepCosts,
)
from sglmoe.scheduler.report import Restarts

METRICS = (ROOT / "docs" / "metrics.md").read_text()
ON_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_every_block_says_what_it_is() -> None:
    """One that does not would be run by no test."""
    assert [block for block in blocks() if block.language not in LANGUAGES] == []
    fences = sum(page.read_text().count("\n```") for page in PAGES)
    assert fences == 2 * len(blocks())


@ON_PAGES
def test_links_lead_to_files(page: Path) -> None:
    local = [link for link in links(page) if not link.startswith("https://")]
    missing = [link for link in local if not (page.parent / link.partition("#")[0]).exists()]
    assert missing == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link for link in links(ROOT / "README.md") if link.startswith("docs/")}
    assert linked == {f"docs/{page.name}" for page in PAGES[1:]}


def test_the_readme_opens_with_a_sentence_a_command_and_a_measured_table() -> None:
    opening = (ROOT / "README.md").read_text().split("\n## ")[0]
    before, command, after = re.split(r"^```(?:sh)?\n", opening, flags=re.MULTILINE)
    assert before.count(". ") == 0
    assert command == "make serve\n"
    assert re.search(r"^\|(?: [\d.]+ \|){4}$", after, re.MULTILINE)
    assert "serving-demo-cpu/report.md" in after


def rows_of(table: str) -> list[list[str]]:
    lines = re.findall(r"^\|(.*)\|$", table, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_the_readmes_table_is_the_reports() -> None:
    """Its ratios of tokens per second: by requests at a time, at 100, 50 and 25 % of the experts."""
    report = (ROOT / "eval" / "results" / "serving-demo-cpu" / "report.md").read_text()
    measured: dict[str, list[str]] = {}
    for concurrency, _, system, _, ratio, *_ in rows_of(report)[2:]:
        if system.startswith("sglmoe@"):
            measured.setdefault(concurrency, []).append(ratio.split()[0])
    quoted = {row[0]: row[1:] for row in rows_of((ROOT / "README.md").read_text())[2:5]}
    assert quoted == measured


# Names in code that look like paths and are not of this repository, or are patterns.
NOT_OUR_FILES = {
    ".venv/bin/activate": "made by make",
    "MODEL/packed-experts": "made by sglmoe.pack",
    "kernels/ops/moe/fused_moe_triton_kernels.py": "SGLang's",
    "srt/layers/moe/moe_runner/triton_utils/fused_moe.py": "SGLang's",
    "srt/layers/moe/paged_experts/method.py": "SGLang's",
    "launch/MACHINE/MODEL.toml": "a pattern",
    "docs/*.md": "a pattern",
}
_PATH = re.compile(r"[\w.-]+(?:/[\w.*@-]+)*\.(?:py|md|toml|json|jsonl|txt|sh|png|yaml|service)")


def places(name: str) -> Iterator[Path]:
    """Pages name files from the root, or from the package, its folders, docs, eval or tests."""
    for base in ("", "sglmoe", "docs", "eval", "launch", "tests/e2e", "tests/unit", "tests"):
        yield ROOT / base / name
    for folder in ("memory", "prediction", "scheduler", "worker", "kernels", "plan"):
        yield ROOT / "sglmoe" / folder / name


@ON_PAGES
def test_files_that_are_named_exist(page: Path) -> None:
    named = {span for span in code_spans(page) if _PATH.fullmatch(span) and "/" in span}
    missing = [name for name in named if not any(path.exists() for path in places(name))]
    assert [name for name in missing if name not in NOT_OUR_FILES] == []


@ON_PAGES
def test_modules_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"python -m ((?:sglmoe|eval)[\w.]*\w)", prose(page)))
    assert [name for name in named if importlib.util.find_spec(name) is None] == []


@ON_PAGES
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"`make ([\w-]+)", prose(page)))
    assert named <= set(targets)


# Flags of other programs and of SGLang's commands beside its server.
THEIRS = {
    "--gpus": "docker",
    "--memory": "docker",
    "--ulimit": "docker",
    "--n-cpu-moe": "llama.cpp",
    "--cpu-offload-gb": "unmodified SGLang, to compare with",
    "--constraint": "pip",
    "--editable": "pip",
    "--hypothesis-profile": "hypothesis",
    "--tp-size": "SGLang's, refused by its namespace",
}


def flags_of_ours() -> set[str]:
    """Any that a parser of ours knows, anywhere, and those of SGLang's server."""
    sources = [*(ROOT / "sglmoe").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]
    texts = [path.read_text() for path in sources if path.parent.name != "errors"]
    found = {name for text in texts for name in re.findall(r'"(--[a-z][\w-]*)', text)}
    named = flags.HONOURED | flags.VALUES.keys() | flags.REASONS.keys()
    return found | {flags.flag_name(name) for name in named}


def test_flags_that_are_named_exist() -> None:
    named = {
        name
        for page in PAGES
        for text in (*code_spans(page), *(block.text for block in blocks()))
        for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
    }
    assert named - flags_of_ours() == set(THEIRS)


# ---------------------------------------------------------------------------------------------------- metrics.md


def documented_metrics() -> dict[str, tuple[str, str]]:
    """By name: its kind, the head of its table, and its text."""
    found, kind = {}, ""
    for line in METRICS.splitlines():
        if head := re.match(r"\| (gauge|counter) \|", line):
            kind = head[1]
        elif row := re.match(r"\| `(sglmoe_\w+)` \| (.*) \|$", line):
            found[row[1]] = (kind, row[2])
    return found


def exported_metrics() -> dict[str, tuple[str, str]]:
    """As Prometheus is shown them."""
    from prometheus_client import REGISTRY

    from sglmoe.scheduler.frontend_own_metrics import OwnMetrics

    OwnMetrics({"model_name": "any"})
    found = {}
    for family in REGISTRY.collect():
        if family.name.startswith("sglmoe_"):
            suffix = "_total" if family.type == "counter" else ""
            found[family.name + suffix] = (family.type, family.documentation)
    return found


def test_metrics_md_has_every_metric_with_its_kind_and_help_text() -> None:
    assert documented_metrics() == exported_metrics()


def documented_fields(start: str) -> set[str]:
    """What a row of the /server_info tables quotes: the row whose first cell is `start`."""
    (row,) = [line for line in METRICS.splitlines() if line.startswith(f"| `{start}` |")]
    return set(re.findall(r"`(\w+)`", row.partition(" | ")[2]))


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("plan", ResidencyPlan),
        ("costs", StepCosts),
        ("prefetch", PrefetchReport),
        ("packed", PackedReport),
        ("limits", Limits),
        ("restarts", Restarts),
    ],
)
def test_metrics_md_has_every_field_of_server_info(part: str, kind: type[msgspec.Struct]) -> None:
    assert documented_fields(part) == set(kind.__struct_fields__)


def test_metrics_md_has_every_field_of_memory() -> None:
    table = METRICS.split("| `sglmoe.memory.` | |")[1]
    named = set(re.findall(r"`((?!sglmoe_)\w+)`", table))
    parts = {"plan", "costs", "prefetch", "packed"}  # have rows of their own
    assert named == set(MemorySnapshot.__struct_fields__) - parts
