"""The command: traces in, a predictor and its report out, or a sentence that says what is wrong."""

import json
import sys
from pathlib import Path

import pytest
from tiny_traces import random_trace

from sglmoe.prediction import train
from sglmoe.prediction.routing_path import from_saved
from sglmoe.prediction.saved import ServedShape, load_predictor
from sglmoe.prediction.trace import save_trace
from sglmoe.prediction.training_data import TrainingData, load_parts, split

SHAPE = ServedShape(num_layers=2, num_experts=4, top_k=2, vocab_size=11)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two traces and their model's configuration."""
    save_trace(random_trace(20, seed=0), tmp_path / "a.npz")
    save_trace(random_trace(6, seed=1), tmp_path / "b.npz")
    (tmp_path / "config.json").write_text('{"vocab_size": 11}')
    return tmp_path


def run(folder: Path, *arguments: object, trace: str = "a.npz") -> int:
    flags = [f"--model-path={folder}", f"--trace={folder / trace}", f"--output={folder / 'out'}"]
    return train.main([*flags, "--predictor=routing_path", *map(str, arguments)])


def test_a_predictor_and_its_report_are_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--epochs=2", "--test", folder / "b.npz") == 0
    out = folder / "out"
    names = sorted(path.name for path in out.iterdir())
    assert names == ["routing_path.json", "routing_path.png", "routing_path.safetensors"]
    its, tensors = load_predictor(out, "routing_path", SHAPE)
    from_saved(its.settings, tensors)
    printed = capsys.readouterr().out
    for requests in ("| a ", "| b "):
        assert f"{requests}| " in printed
    measured = json.loads((out / "routing_path.json").read_text())["report"]["measured"]
    assert {(m["requests"], m["predictor"]) for m in measured} == {
        (requests, predictor)
        for requests in ("a", "b")
        for predictor in ("routing_path", "last_step", "frequency")
    }
    assert len(its.report["losses"]) == 2
    assert its.trained_on[0].startswith("a: ")


def test_without_matplotlib_there_is_no_plot(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(folder, "--epochs=1", trace="b.npz") == 0
    assert "no plot" in capsys.readouterr().out
    names = sorted(path.name for path in (folder / "out").iterdir())
    assert names == ["routing_path.json", "routing_path.safetensors"]


def test_traces_of_different_models_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_trace(random_trace(4, seed=2, model="other"), folder / "c.npz")
    assert run(folder, "--test", folder / "c.npz") == 1
    error = capsys.readouterr().err
    assert "a.npz is a trace of tiny (2 layers of 4 experts, top 2)" in error
    assert "c.npz of other (2 layers" in error
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (
            '{"vocab_size": 5}',
            "a.npz has token id 10, and the vocabulary of --model-path ends at 4",
        ),
        ("{}", "config.json has no vocab_size"),
        (None, "has no config.json: name a model's folder"),
    ],
)
def test_a_model_that_does_not_fit_is_named(
    config: str | None, complaint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    assert run(folder) == 1
    assert complaint in capsys.readouterr().err


def test_a_trace_that_is_none_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "broken.npz").write_bytes((folder / "a.npz").read_bytes()[:100])
    for name in ("broken.npz", "missing.npz"):
        assert run(folder, trace=name) == 1
        assert name in capsys.readouterr().err


def test_interrupted_it_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(data: TrainingData) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "TRAINERS", {"routing_path": interrupted})
    assert run(folder) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_no_epochs_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--epochs=0") == 1
    assert "--epochs 0: at least 1" in capsys.readouterr().err


def test_a_tenth_of_each_traces_requests_is_held_out(folder: Path) -> None:
    shape, parts = load_parts([folder / "a.npz", folder / "b.npz"], 11)
    assert shape == SHAPE
    taught, held_out = split(parts, held_out_ratio=0.1, seed=0)
    assert [int(part.requests.sum()) for part in taught] == [18, 5]
    for one, other in zip(taught, held_out, strict=True):
        assert (one.requests != other.requests).all()
    again, _ = split(parts, held_out_ratio=0.1, seed=0)
    assert (taught[0].requests == again[0].requests).all()


def test_a_trace_of_one_request_has_none_to_test_with(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_trace(random_trace(1, seed=0), folder / "one.npz")
    assert run(folder, trace="one.npz") == 1
    assert "one is of one request" in capsys.readouterr().err
