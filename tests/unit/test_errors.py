"""Every message that a person may read: what happened, all numbers, what to change; and it is in the documentation.

Red for a message that forgets a number it was given, says nothing to do, names a flag that does not exist, is a page
long, is not in docs/troubleshooting.md, or is written anywhere but in `sglmoe/errors/`.
"""

import ast
import importlib
import inspect
import pickle
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sglmoe import flags
from sglmoe.errors import sglang_words
from sglmoe.errors.user_error import UserError
from sglmoe.launch_server import our_parser
from sglmoe.units import parse_bytes, show_bytes

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sglmoe" / "errors"
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
MAX_CHARACTERS = 400

Message = Callable[..., UserError]


def messages() -> Iterator[tuple[str, Message]]:
    """All functions of the package that make one."""
    for path in sorted(PACKAGE.glob("*.py")):
        module = importlib.import_module(f"sglmoe.errors.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and name != "as_sglang_says":
                yield f"{path.stem}.{name}", function


MESSAGES = dict(messages())


def example(name: str, kind: Any, number: int) -> tuple[Any, list[str]]:
    """A value for an argument, unlike any other's, and how a person should read it."""
    if name == "flag":
        return "--memory-budget", ["--memory-budget"]
    if kind is bool:
        return True, []
    if kind is float:
        return number + 0.25, [str(number)]
    if kind is int:
        value = number << 20 if name.endswith("_bytes") else number
        return value, [show_bytes(value) if name.endswith("_bytes") else str(value)]
    if kind is Path:
        return Path(f"/models/file{number}"), [f"/models/file{number}"]
    if kind is str:
        return f"word{number}", [f"word{number}"]
    assert kind == Sequence[str], f"{name}: {kind} has no example"
    return [f"one{number}", f"two{number}"], [f"one{number}", f"two{number}"]


def words_of_parse_bytes(text: str) -> str:
    with pytest.raises(ValueError, match=text) as raised:
        parse_bytes(text, whole_bytes=1)
    return str(raised.value)


# Where words of elsewhere are nearly all of the message.
GIVEN: dict[str, dict[str, Any]] = {
    "not_a_size": {"why": words_of_parse_bytes("lots")},
    "refused_flags": {"reasons": [f"--tp-size=2: {flags.PARALLEL}"]},
}


def with_examples(message: Message) -> tuple[UserError, list[str]]:
    kinds = typing.get_type_hints(message)
    examples = {
        name: example(name, kinds[name], 101 + 7 * place)
        for place, name in enumerate(inspect.signature(message).parameters)
    }
    given = GIVEN.get(message.__name__, {})
    error = message(**{name: value for name, (value, _) in examples.items()} | given)
    return error, [
        word for name, (_, words) in examples.items() if name not in given for word in words
    ]


@pytest.fixture(params=MESSAGES)
def message(request: pytest.FixtureRequest) -> Message:
    return MESSAGES[request.param]


def test_it_names_every_number_and_name_that_it_is_given(message: Message) -> None:
    error, words = with_examples(message)
    missing = [word for word in words if word not in str(error)]
    assert not missing, f"{error}: {missing}"


# What one can do about a message that names no flag. In order of appearance in sglmoe/errors.
ACTIONS = (
    "ulimit",
    "unmodified SGLang",
    "SSD of this machine",
    "convert the checkpoint",
    "download it",
    "restore the file",
    "python -m sglmoe.",
    "serve it as it is",
    "bf16, fp16 or fp32",
    "lm_head of its own",
    "take the checkpoint's own",
    "train again",
    "record it again",
    "python -m eval.trace",
    "in the log above",
    "its log says why",
    "machines.toml",
    "is not a folder with",
    "send ",
    "use n instead",
    "input_ids",
    "_start_len",
    "merge them",
    "one server for each device",
    "stop it yourself",
    "stop it first",
    "start one with",
    "are unknown; use",
    "use another model",
    "try again when",
    "ask again",
    "please report this",
)
# Those whose reason, which they carry on, is another message of these or SGLang's, and says it.
REASON_SAYS_IT = {
    "checkpoints.unreadable_file": "the system's: No such file or directory, Permission denied",
    "models.not_understood": "SGLang's",
    "options.bad_recipe": "what is wrong in the file",
    "requests.bad_stop_regex": "re's; the field is named",
    "requests.fatal": "how the worker died",
    "requests.going_down": "why no worker serves",
    "workers.given_up": "how the last worker ended",
}


def says_what_to_change(text: str) -> bool:
    return bool(re.search(r"--[a-z]", text)) or any(action in text for action in ACTIONS)


@pytest.mark.parametrize("name", MESSAGES)
def test_it_says_what_to_change(name: str) -> None:
    text = str(with_examples(MESSAGES[name])[0])
    assert says_what_to_change(text) != (name in REASON_SAYS_IT), text


def test_no_action_is_named_that_no_message_asks_for() -> None:
    texts = [str(with_examples(message)[0]) for message in MESSAGES.values()]
    without_flag = [text for text in texts if not re.search(r"--[a-z]", text)]
    assert [it for it in ACTIONS if not any(it in text for text in without_flag)] == []
    assert set(REASON_SAYS_IT) <= set(MESSAGES)


def known_flags() -> set[str]:
    """The server's, SGLang's and those of our other commands."""
    found = {option for action in our_parser()._actions for option in action.option_strings}
    for name in flags.HONOURED | flags.VALUES.keys() | flags.REASONS.keys():
        found.add(flags.flag_name(name))
    for path in ("plan/__main__.py", "pack.py", "prediction/train.py", "recipe.py"):
        found |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / "sglmoe" / path).read_text()))
    # Known to argparse, docker, and SGLang, whose parallel flags are refused by their namespace.
    return found | {"--help", "--ulimit", "--tp-size"}


def test_no_message_names_a_flag_that_does_not_exist(message: Message) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", str(with_examples(message)[0])))
    assert named <= known_flags()


def test_it_is_short_and_a_sentence(message: Message) -> None:
    text = str(with_examples(message)[0])
    assert len(text) < MAX_CHARACTERS
    assert "  " not in text.replace("\n  ", "")
    assert text == text.strip()


def test_it_crosses_processes_with_its_status(message: Message) -> None:
    error = with_examples(message)[0]
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.status) == (UserError, str(error), error.status)


@pytest.mark.parametrize("name", [name for name in MESSAGES if name.startswith("requests.")])
def test_only_what_a_client_can_change_is_its_fault(name: str) -> None:
    """4xx say: send something else. These are not that."""
    ours = {"unreadable_request": 500, "fatal": 500}
    ours |= {"never_fits": 503, "no_longer_fits": 503, "going_down": 503}
    status = with_examples(MESSAGES[name])[0].status
    assert status == ours.get(name.removeprefix("requests."), 400)


# ------------------------------------------------------------------------------------------------- documentation


def documented() -> dict[str, re.Pattern[str]]:
    """The messages of docs/troubleshooting.md: what a table's first column quotes, "…" standing for anything."""
    quoted = re.findall(r"^\| `([^`]+)`", TROUBLESHOOTING, re.MULTILINE)
    return {
        text: re.compile(".+?".join(map(re.escape, text.split("…"))), re.DOTALL) for text in quoted
    }


def sglangs() -> list[str]:
    return [text for name, text in vars(sglang_words).items() if name.isupper()]


def test_it_is_in_the_documentation(message: Message) -> None:
    text = str(with_examples(message)[0])
    assert any(pattern.match(text) for pattern in documented().values()), text


def test_sglangs_words_are_in_the_documentation() -> None:
    patterns = documented().values()
    assert [text for text in sglangs() if not any(it.match(text) for it in patterns)] == []


def test_nothing_is_documented_that_is_never_said() -> None:
    texts = [str(with_examples(message)[0]) for message in MESSAGES.values()] + sglangs()
    stale = [
        quoted
        for quoted, pattern in documented().items()
        if not any(pattern.match(text) for text in texts)
    ]
    assert stale == []


def test_no_entry_would_fit_every_message() -> None:
    """One of a few letters would hide what is missing."""
    vague = [text for text in documented() if len(text.replace("…", "").strip()) < 7]
    assert vague == []


# ------------------------------------------------------------------------------------------------------ one place

# Words for people that are raised elsewhere: (file, the error's class).
ELSEWHERE = {
    ("units.py", "ValueError"): "the end of a message: not_a_size puts the flag before it",
    ("memory/store.py", "ValueError"): "an assertion: loaders know no other tensors",
    ("scheduler/planner.py", "ValueError"): "an assertion on what the worker sends",
    ("scheduler/scheduler.py", "WorkerLost"): "an assertion on what the worker sends",
    ("scheduler/worker_client.py", "WorkerLost"): "an assertion on what the worker sends",
}
FOR_PEOPLE = ("ValueError", "RuntimeError", "SystemExit", "UserError", "WorkerLost", "aborted")


def has_words(node: ast.AST) -> bool:
    """Whether a text is written here: two words in a row in a string, formatted or not."""
    texts = [
        it.value
        for it in ast.walk(node)
        if isinstance(it, ast.Constant) and isinstance(it.value, str)
    ]
    return any(re.search(r"[A-Za-z']{2,} [A-Za-z']{2,}", text) for text in texts)


def worded_errors() -> set[tuple[str, str]]:
    """Calls outside of the package that make an error for people out of a text of their own."""
    found = set()
    for path in sorted((ROOT / "sglmoe").rglob("*.py")):
        if PACKAGE in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if (name in FOR_PEOPLE or name == "sys.exit") and has_words(node):
                found.add((path.relative_to(ROOT / "sglmoe").as_posix(), name))
    return found


def test_messages_for_people_are_worded_in_one_place() -> None:
    """A new one belongs into sglmoe/errors; an assertion belongs into the table."""
    assert worded_errors() == set(ELSEWHERE)


def test_a_message_is_seen_wherever_it_is_worded() -> None:
    """The check above sees plain, formatted and long strings."""
    for code in ("f('what is wrong')", "f(f'{x}: no such file')", "f('a ' 'lot of ' f'{words}')"):
        assert has_words(ast.parse(code))
    assert not has_words(ast.parse("f(f'{program}: {error}')"))
