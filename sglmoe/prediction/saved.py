"""Trained predictors as files: NAME.safetensors, and NAME.json that says what it is.

The description is written last and has the checksum of the other file, so a pair that was cut
short or mixed up is refused.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from sglmoe.errors import predictors

FORMAT_VERSION = 1

Tensors = Mapping[str, npt.NDArray[Any]]


class ServedShape(msgspec.Struct, frozen=True):
    """What of a model decides whether a predictor fits it."""

    num_layers: int  # that have experts
    num_experts: int
    top_k: int
    vocab_size: int

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers of {self.num_experts} experts (top {self.top_k}) "
            f"and {self.vocab_size} token ids"
        )


class Description(msgspec.Struct, frozen=True):
    """What a trained predictor says of itself."""

    predictor: str  # its name in `train.TRAINERS`, and the files'
    model: str  # whose traces it learned from
    shape: ServedShape
    settings: dict[str, Any]  # what its constructor needs beside the tensors
    trained_on: list[str]
    report: dict[str, Any]  # what was measured after training
    checksum: str = ""  # SHA-256 of the tensors' file: `save_predictor` fills it in
    version: int = FORMAT_VERSION


def save_predictor(folder: Path, its: Description, tensors: Tensors) -> None:
    """Write both files, each whole or not at all."""
    content = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    its = msgspec.structs.replace(its, checksum=hashlib.sha256(content).hexdigest())
    description = msgspec.json.format(msgspec.json.encode(its), indent=2) + b"\n"
    folder.mkdir(parents=True, exist_ok=True)
    files = {tensors_path(folder, its.predictor): content}
    files |= {description_path(folder, its.predictor): description}
    unfinished = {path: path.with_name(f"{path.name}.unfinished") for path in files}
    try:
        for path, new in unfinished.items():
            new.write_bytes(files[path])
        for path, new in unfinished.items():
            new.replace(path)
    finally:
        for new in unfinished.values():
            new.unlink(missing_ok=True)


def load_predictor(
    folder: Path, predictor: str, served: ServedShape
) -> tuple[Description, dict[str, npt.NDArray[Any]]]:
    """Its description and tensors.

    Raises ValueError for files that are missing, broken or of another version, naming them, and for a
    predictor of a model of another shape than the one served.
    """
    its = read_description(description_path(folder, predictor))
    if its.shape != served:
        raise predictors.of_another_model(
            path=description_path(folder, predictor),
            its_shape=str(its.shape),
            its_model=its.model,
            served=str(served),
            predictor=predictor,
        )
    path = tensors_path(folder, predictor)
    content = read(path)
    if hashlib.sha256(content).hexdigest() != its.checksum:
        raise predictors.other_tensors(path=path, size=len(content))
    return its, load(content)


def read_description(path: Path) -> Description:
    """Raises ValueError for a file that is missing, broken or of another version."""
    content = read(path)
    try:
        version = msgspec.json.decode(content, type=_Version).version
        if version != FORMAT_VERSION:
            raise predictors.of_version(path=path, version=version, expected=FORMAT_VERSION)
        return msgspec.json.decode(content, type=Description)
    except msgspec.DecodeError as error:
        raise predictors.no_description(path=path, why=str(error)) from error


class _Version(msgspec.Struct, frozen=True):
    version: int


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise predictors.unreadable(path=path, why=str(error.strerror)) from error


def tensors_path(folder: Path, predictor: str) -> Path:
    return folder / f"{predictor}.safetensors"


def description_path(folder: Path, predictor: str) -> Path:
    return folder / f"{predictor}.json"
