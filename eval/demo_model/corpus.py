"""The demo model's training text: what every machine with Python and Debian has, and generated tasks.

Files are read in sorted order and generated text depends on the step alone, so the same machine
gives the same batches. Every 50th file of a domain is held out for the validation loss.
"""

import ast
import gzip
import hashlib
import random
import sysconfig
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eval.demo_model.tasks import arithmetic_document, chat, recall_document

TokenIds = npt.NDArray[np.uint16]

SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
MAX_DOCUMENT_CHARACTERS = 65536
HELD_OUT_EVERY = 50
GREETING = (
    "Hello. I am a small demo model: I add numbers, look up keys and write something like Python."
)
# Share of the windows of a batch.
DOMAIN_SHARES = {"python": 0.3, "prose": 0.25, "chat": 0.1, "arithmetic": 0.2, "recall": 0.15}


class Corpus(NamedTuple):
    """Documents by domain, training and held out."""

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]

    @property
    def digest(self) -> str:
        """Names the text: the same on machines that have the same files."""
        whole = hashlib.sha256()
        for documents in (*self.train.values(), *self.held_out.values()):
            for document in documents:
                whole.update(document.encode())
        return whole.hexdigest()[:16]


def read_corpus() -> Corpus:
    """The text of this machine."""
    sources = list(python_sources())
    functions = [pair for source in sources for pair in documented_functions(source)]
    domains = {
        "python": sources,
        "prose": list(prose_documents(sources)),
        "chat": [chat(question, answer) for question, answer in functions]
        + [chat(word, GREETING) for word in ("hello", "Hello", "hi", "Who are you?") * 100],
    }
    return Corpus(
        {
            name: [document for i, document in enumerate(texts) if i % HELD_OUT_EVERY]
            for name, texts in domains.items()
        },
        {name: texts[::HELD_OUT_EVERY] for name, texts in domains.items()},
    )


def python_sources() -> Iterator[str]:
    """The standard library, without its tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            text = read_ascii(path)
            if text and "pydoc_data" not in path.parts:
                yield text


def documented_functions(source: str) -> Iterator[tuple[str, str]]:
    """Short functions with a docstring, as questions and answers."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            if len(code) < 900 and not node.name.startswith("_"):
                yield f"Write the function {node.name}.", code
                yield f"What does {node.name} do?", text.split("\n\n")[0]


def prose_documents(sources: Iterable[str]) -> Iterator[str]:
    """Docstrings, Python's help topics and Debian's documentation; no document twice."""
    seen: set[str] = set()
    for text in (*docstrings(sources), *help_topics(), *debian_documents()):
        start = text[:500]
        if start not in seen:
            seen.add(start)
            yield text[:MAX_DOCUMENT_CHARACTERS]


def docstrings(sources: Iterable[str]) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text) > 200:
                yield text


def help_topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if topics[name].isascii():
            yield topics[name]


def debian_documents() -> Iterator[str]:
    patterns = ("README*", "NEWS*", "*.txt", "*.txt.gz", "copyright", "FAQ*")
    root = Path("/usr/share/doc")
    paths = {path for pattern in patterns for path in root.rglob(pattern)}
    for path in sorted((*paths, *Path("/usr/share/common-licenses").glob("*"))):
        if path.is_file() and not path.is_symlink() and (text := read_ascii(path)):
            yield text


def read_ascii(path: Path) -> str:
    """A file's text; nothing if it is not plain ASCII of some length."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            text = file.read().decode("ascii")
    except (OSError, UnicodeDecodeError):
        return ""
    return text if len(text) > 200 else ""


class Batches:
    """Windows of token ids, in the shares of `DOMAIN_SHARES`; a batch depends on its step alone."""

    def __init__(self, documents: dict[str, list[str]], tokenizer: Any, *, seed: int):
        self._streams = {name: encode(texts, tokenizer) for name, texts in documents.items()}
        self._tokenizer = tokenizer
        self._seed = seed

    @property
    def num_tokens(self) -> dict[str, int]:
        return {name: len(stream) for name, stream in self._streams.items()}

    def draw(self, step: int, num_windows: int, window: int) -> tuple[TokenIds, list[str]]:
        """[num_windows, window + 1] token ids, and each row's domain."""
        rng = random.Random(f"{self._seed}/{step}")
        domains = [
            name for name, share in DOMAIN_SHARES.items() for _ in range(round(share * num_windows))
        ]
        return np.stack([self._window_of(name, window, rng) for name in domains]), domains

    def _window_of(self, domain: str, window: int, rng: random.Random) -> TokenIds:
        if domain == "arithmetic":
            return self._generate(arithmetic_document, window, rng)
        if domain == "recall":
            return self._generate(recall_document, window, rng)
        stream = self._streams[domain]
        start = rng.randrange(len(stream) - window)
        return stream[start : start + window + 1]

    def _generate(
        self, document: Callable[[random.Random], str], window: int, rng: random.Random
    ) -> TokenIds:
        ids: list[int] = []
        while len(ids) <= window:
            ids += self._tokenizer.encode(document(rng)).ids
        return np.array(ids[: window + 1], dtype=np.uint16)


def encode(documents: list[str], tokenizer: Any) -> TokenIds:
    """All documents, one after the other, each with an end-of-text token."""
    end = tokenizer.token_to_id("</s>")
    parts = []
    for text in tokenizer.encode_batch(documents):
        ids = text.ids if text.ids[-1] == end else [*text.ids, end]
        parts.append(np.array(ids, dtype=np.uint16))
    return np.concatenate(parts)
