"""What is loaded is what was saved, or a sentence that says what is wrong with it."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from sglmoe.prediction.saved import Description, ServedShape, load_predictor, save_predictor

SHAPE = ServedShape(num_layers=2, num_experts=4, top_k=2, vocab_size=11)
DESCRIPTION = Description(
    predictor="some", model="tiny", shape=SHAPE, settings={"width": 3}, trained_on=["a"], report={}
)
TENSORS = {"weights": np.arange(6, dtype=np.float16).reshape(2, 3)}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    save_predictor(tmp_path / "new", DESCRIPTION, TENSORS)
    its, tensors = load_predictor(tmp_path / "new", "some", SHAPE)
    assert msgspec.structs.replace(its, checksum="") == DESCRIPTION
    assert tensors["weights"].tolist() == [[0, 1, 2], [3, 4, 5]]
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["some.json", "some.safetensors"]


@pytest.mark.parametrize("field", ServedShape.__struct_fields__)
def test_a_predictor_of_another_shape_is_refused(field: str, tmp_path: Path) -> None:
    save_predictor(tmp_path, DESCRIPTION, TENSORS)
    served = msgspec.structs.replace(SHAPE, **{field: 48})
    with pytest.raises(ValueError, match="train on traces of this model") as refusal:
        load_predictor(tmp_path, "some", served)
    text = str(refusal.value)
    assert f"predicts for {SHAPE} (tiny)" in text
    assert f"the model served has {served}" in text


def test_other_tensors_than_those_described_are_refused(tmp_path: Path) -> None:
    save_predictor(tmp_path, DESCRIPTION, TENSORS)
    path = tmp_path / "some.safetensors"
    whole = path.read_bytes()
    damaged = whole[:-1] + bytes([whole[-1] ^ 1])
    for content in (whole[:-1], b"", damaged):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"some.safetensors \({len(content)} bytes\) is not"):
            load_predictor(tmp_path, "some", SHAPE)


def test_a_broken_description_is_named(tmp_path: Path) -> None:
    save_predictor(tmp_path, DESCRIPTION, TENSORS)
    path = tmp_path / "some.json"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"[]", b'{"version": 1}', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"some.json does not describe a predictor"):
            load_predictor(tmp_path, "some", SHAPE)
    path.write_bytes(whole.replace(b'"version": 1', b'"version": 9'))
    with pytest.raises(ValueError, match=r"some\.json has version 9, not 1: train again"):
        load_predictor(tmp_path, "some", SHAPE)


@pytest.mark.parametrize("name", ["some.json", "some.safetensors"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    save_predictor(tmp_path, DESCRIPTION, TENSORS)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: No such file"):
        load_predictor(tmp_path, "some", SHAPE)


def test_an_interrupted_save_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_predictor(tmp_path, DESCRIPTION, TENSORS)

    def interrupted(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_predictor(tmp_path, DESCRIPTION, {"weights": np.zeros(9)})
    monkeypatch.undo()
    assert load_predictor(tmp_path, "some", SHAPE)[1]["weights"].shape == (2, 3)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_save_between_its_two_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_predictor(tmp_path, DESCRIPTION, TENSORS)
    replace = Path.replace
    replaced: list[str] = []

    def killed_after_the_first(self: Path, target: Path) -> Path:
        if replaced:
            raise KeyboardInterrupt
        replaced.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        save_predictor(tmp_path, DESCRIPTION, {"weights": np.zeros(9)})
    monkeypatch.undo()
    assert replaced == ["some.safetensors"]
    with pytest.raises(ValueError, match="of another training"):
        load_predictor(tmp_path, "some", SHAPE)
