"""The schema is what the page of documentation says, and the page draws all letters there are."""

import re
import types
import typing
from pathlib import Path
from typing import Any, get_args

import msgspec
from states import STATE, large_map

from sglmoe.live_view import picture
from sglmoe.live_view.state import LiveState
from sglmoe.protocol import FRAME_KINDS, HEAT_LEVELS, RESIDENCY

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "sglmoe" / "live_view" / "page.html").read_text()


def field_names(struct: Any, prefix: str = "") -> list[str]:
    """Of all leaves, with dots."""
    names: list[str] = []
    for field in msgspec.structs.fields(struct):
        options = get_args(field.type) if is_union(field.type) else (field.type,)
        nested = [
            kind for kind in options if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
        ]
        name = prefix + field.name
        names += field_names(nested[0], name + ".") if nested else [name]
    return names


def is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def test_every_field_is_documented_and_nothing_else() -> None:
    text = (ROOT / "docs" / "live-view.md").read_text()
    assert re.findall(r"^\| `([a-z_.]+)` \|", text, re.M) == field_names(LiveState)


def test_it_comes_out_as_it_went_in() -> None:
    assert msgspec.json.decode(msgspec.json.encode(STATE), type=LiveState) == STATE


def test_page_and_terminal_know_every_letter() -> None:
    assert letters_of("FRAMES") == set(picture.FRAMES) == set(FRAME_KINDS.values())
    assert letters_of("EXPERTS") == set(picture.EXPERTS) == set(RESIDENCY.values())
    assert [int(digit, 36) for digit in HEAT_LEVELS] == list(range(36))


def letters_of(name: str) -> set[str]:
    """The keys of one of the page's tables: their values are lists."""
    (table,) = re.findall(rf"const {name} = {{(.*?)}};", PAGE, re.S)
    return {letter.strip('"') for letter in re.findall(r'("?[a-z.]"?): \[', table)}


def test_the_page_reads_no_field_that_is_not_there() -> None:
    """`m.kv_frames` and its like: a word with an underscore behind a dot is a field of the state."""
    read = set(re.findall(r"\.([a-z]+(?:_[a-z]+)+)", PAGE.partition("<script>")[2]))
    assert len(read) > 20
    assert read <= {name.rpartition(".")[2] for name in field_names(LiveState)}


def test_the_page_asks_nobody_but_its_server() -> None:
    assert re.findall(r"(?:src|href) *= *[\"'](?!data:)", PAGE) == []
    assert re.findall(r"https?://(?!host)", PAGE) == []
    assert "@import" not in PAGE
    assert "url(" not in PAGE


def test_a_large_model_stays_small() -> None:
    state = msgspec.structs.replace(STATE, map=large_map(3000, 48, 128))
    assert len(msgspec.json.encode(state)) < 20_000
