"""The demo model is made once, whole or not at all. Making it is replaced: it takes torch."""

from pathlib import Path

import pytest

from sglmoe import demo_model
from sglmoe.demo_model import demo_model_path, ensure_demo_model


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    folders: list[Path] = []

    def make(folder: Path) -> None:
        folders.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(demo_model, "make_demo_model", make)
    return folders


def test_it_lives_in_the_users_cache() -> None:
    path = demo_model_path({"XDG_CACHE_HOME": "/cache"})
    assert path == Path(f"/cache/sglmoe/demo-model-{demo_model.VERSION}")


def test_it_is_made_once(tmp_path: Path, made: list[Path]) -> None:
    path = tmp_path / "sglmoe" / "demo"
    assert ensure_demo_model(path) == ensure_demo_model(path) == path
    assert len(made) == 1
    assert [file.name for file in path.iterdir()] == ["config.json"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_the_disk(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half of it")
        raise OSError("no space left")

    monkeypatch.setattr(demo_model, "make_demo_model", fill_the_disk)
    with pytest.raises(OSError, match="no space left"):
        ensure_demo_model(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_processes_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "demo"

    def make_while_another_does(folder: Path) -> None:
        for made in (folder, path):
            made.mkdir(exist_ok=True)
            (made / "config.json").write_text(made.name)

    monkeypatch.setattr(demo_model, "make_demo_model", make_while_another_does)
    ensure_demo_model(path)
    assert (path / "config.json").read_text() == "demo"
    assert list(tmp_path.iterdir()) == [path]
