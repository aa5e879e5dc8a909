"""README and docs do what they say: each command is run, or where it would take long or a GPU its arguments are parsed.

A command is of one of these kinds, or in `NOT_RUN` with the reason; a new kind is red, and so is a reason that is not needed.
"""

import io
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import requests
from command_lines import parsed, refused, run_module
from documents import ROOT, blocks, commands
from forking import run_in_fork
from serving import run_as_a_user, running_server

from sglmoe.demo_model import DEMO_MODEL

pytestmark = pytest.mark.usefixtures("preloaded")

MODULE = "sglmoe.launch_server"
URL = "http://localhost:30000"
COMMANDS = commands()
MAKE = [it for it in COMMANDS if it[1][0] == "make"]
CURL = [it for it in COMMANDS if it[1][0] == "curl"]
RECIPES = [it for it in COMMANDS if it[1][0].endswith(".toml")]
PYTHON = [it for it in COMMANDS if it[1][:2] in (("python", "-m"), (".venv/bin/python", "-m"))]
SNIPPETS = [block for block in blocks() if block.language == "python"]

# First words of commands that no test runs, and why.
NOT_RUN = {
    "pip install": "installs into this environment; make install does the same in CI",
}
# What pages write for something of the reader's.
PLACEHOLDERS = {"MODEL": str(DEMO_MODEL)}


def name_of(it: tuple[str, tuple[str, ...]]) -> str:
    return f"{it[0]} {' '.join(it[1])[:60]}"


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    known = {it for kind in (MAKE, CURL, RECIPES, PYTHON) for it in kind}
    others = [it for it in COMMANDS if it not in known]
    assert {" ".join(words[:2]) for _, words in others} == set(NOT_RUN)
    assert all((MAKE, CURL, RECIPES, PYTHON, SNIPPETS))


@pytest.mark.parametrize(("place", "words"), MAKE, ids=map(name_of, MAKE))
def test_make_knows_what_to_do(place: str, words: tuple[str, ...]) -> None:
    dry = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr


def server_of(words: tuple[str, ...]) -> list[str]:
    """The server's arguments that make would start it with."""
    # A make within a make says which directory it leaves, after the command.
    dry = subprocess.run(
        [*words, "--dry-run", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True
    )
    last = shlex.split(dry.stdout.splitlines()[-1])
    assert last[:3] == [".venv/bin/python", "-m", MODULE]
    return last[3:]


@pytest.mark.parametrize(
    "words", [words for _, words in MAKE if words[:2] == ("make", "serve")], ids=" ".join
)
def test_make_serve_starts_a_server_with_flags_that_it_takes(words: tuple[str, ...]) -> None:
    assert run_in_fork(refused, server_of(words)) == ""


def python_command(words: tuple[str, ...]) -> tuple[str, list[str]]:
    """Module and arguments."""
    return words[2], [PLACEHOLDERS.get(word, word) for word in words[3:]]


@pytest.mark.parametrize(("place", "words"), PYTHON, ids=map(name_of, PYTHON))
def test_arguments_are_taken(place: str, words: tuple[str, ...]) -> None:
    module, arguments = python_command(words)
    if module == MODULE:
        assert run_in_fork(refused, arguments) == ""
    elif module == "pytest":
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
    else:
        assert run_in_fork(parsed, module, arguments) == ""


PLANS = [it for it in PYTHON if it[1][2] == "sglmoe.plan"]


def printed(module: str, arguments: list[str]) -> tuple[int, str]:
    text = io.StringIO()
    with redirect_stdout(text):
        status = run_module(module, arguments)
    return status, text.getvalue()


@pytest.mark.parametrize(("place", "words"), PLANS, ids=map(name_of, PLANS))
def test_plans_are_made_and_end_in_a_command_that_is_taken(
    place: str, words: tuple[str, ...]
) -> None:
    status, text = run_in_fork(printed, *python_command(words))
    assert status == 0, text
    command = shlex.split(text.splitlines()[-1])
    assert command[:3] == ["python", "-m", MODULE]
    assert run_in_fork(refused, command[3:]) == ""


def test_the_readmes_example_of_a_command_is_what_its_plan_says() -> None:
    ((_, plan),) = [it for it in PLANS if it[0].startswith("README.md")]
    (example,) = [
        words for place, words in PYTHON if place.startswith("README.md") and words[2] == MODULE
    ]
    _, text = run_in_fork(printed, *python_command(plan))
    assert shlex.split(text.splitlines()[-1])[1:] == list(example[1:])


@pytest.mark.parametrize(("place", "words"), RECIPES, ids=map(name_of, RECIPES))
def test_recipes_are_planned(place: str, words: tuple[str, ...]) -> None:
    """Without --dry-run one would become the server."""
    more = [] if "--dry-run" in words else ["--dry-run"]
    recipe = str(ROOT / words[0])
    status, text = run_in_fork(printed, "sglmoe.recipe", [recipe, *words[1:], *more])
    assert status == 0, text
    command = next(line for line in text.splitlines() if f"-m {MODULE}" in line)
    assert run_in_fork(refused, shlex.split(command)[3:]) == ""


# --------------------------------------------------------------------------------- against the README's own server


def run_curl(words: tuple[str, ...], url: str) -> str:
    sent = [word.replace("localhost:30000", url.removeprefix("http://")) for word in words]
    done = subprocess.run(
        [*sent, "--silent", "--fail"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def run_snippet(text: str, url: str = URL) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(text.replace(URL, url), "snippet", "exec"), {"__name__": "__main__"})
    return out.getvalue()


def visit(log: Path) -> dict[str, Any]:
    """What a reader sees who starts the server and types what the pages say."""
    with running_server(MODULE, "--enable-metrics", log=log) as server:
        answers = {name_of(it): run_curl(it[1], server.url) for it in CURL}
        snippets = [block.text for block in SNIPPETS if URL in block.text]
        return {
            "curl": answers,
            "python": [run_snippet(text, server.url) for text in snippets],
            "state": requests.get(f"{server.url}/server_info", timeout=60).json(),
            "metrics": requests.get(f"{server.url}/metrics", timeout=60).text,
        }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, preloaded: None) -> dict[str, Any]:
    return run_in_fork(visit, tmp_path_factory.mktemp("docs") / "log")


def test_the_curl_examples_are_answered(seen: dict[str, Any]) -> None:
    assert len(seen["curl"]) == len({name_of(it) for it in CURL})
    sums = [text for name, text in seen["curl"].items() if "chat/completions" in name]
    assert sums
    assert all('"content":"85"' in text for text in sums)


def test_the_python_examples_run(seen: dict[str, Any]) -> None:
    assert seen["python"] == ["85"]


def test_the_offline_example_runs_as_a_file_of_its_own(tmp_path: Path) -> None:
    """As a user does it: its processes run the file again as their main module."""
    (offline,) = [block.text for block in SNIPPETS if URL not in block.text]
    script = tmp_path / "offline.py"
    script.write_text(offline)
    command = ("env", f"PYTHONPATH={ROOT}", sys.executable, str(script))
    outcome = run_as_a_user(*command, log=tmp_path / "log")
    assert outcome.exitcode == 0, outcome.log[-3000:]
    assert outcome.log.count('\n    """Add') == 1  # it goes on as Python


def test_metrics_md_has_what_the_server_says(seen: dict[str, Any]) -> None:
    """All keys of /server_info, and no metric that is not exported; unit tests compare the rest."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = page.split("| `sglmoe.` | |")[1].split("| `sglmoe.memory.` | |")[0]
    first_cells = [row.split(" | ")[0] for row in rows.splitlines() if row.startswith("| `")]
    documented = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    state = seen["state"]["internal_states"][0]["sglmoe"]
    assert documented == set(state)
    totals = next(row for row in rows.splitlines() if row.startswith("| `totals`"))
    assert set(re.findall(r"`(\w+)`", totals.partition(" | ")[2])) == set(state["totals"])
    assert set(re.findall(r"sglmoe_\w+", page)) <= set(re.findall(r"sglmoe_\w+", seen["metrics"]))
