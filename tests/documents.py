"""README.md and docs/*.md as tests read them: fenced blocks, the commands in them, links, and code in the text."""

import re
import shlex
from itertools import dropwhile
from pathlib import Path

import msgspec

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
LANGUAGES = ("sh", "python", "text")  # sh and python are run; text is a picture
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(msgspec.Struct, frozen=True):
    """What is between two fences."""

    page: str
    line: int
    language: str
    text: str


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page.relative_to(ROOT).as_posix(), line, match[1], match[2]))
    return found


def commands() -> list[tuple[str, tuple[str, ...]]]:
    """Of all sh blocks: where, and the words as a shell would make them, without variables that are set for one command."""
    return [
        (f"{block.page}:{block.line}", tuple(words))
        for block in blocks()
        if block.language == "sh"
        for line in block.text.replace("\\\n", " ").splitlines()
        if (words := [*dropwhile(_ASSIGNMENT.match, shlex.split(line, comments=True))])
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def code_spans(page: Path) -> list[str]:
    """What is `quoted as code` in the text."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))
