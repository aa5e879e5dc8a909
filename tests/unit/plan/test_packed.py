"""A plan takes packed experts to be as large as a server finds them, by what it has in its store."""

from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file, save_file
from tiny_model import TINY
from tiny_packed import TENSOR_BYTES, load_store, make_checkpoint, name_of

from sglmoe import pack
from sglmoe.memory.expert_layout import Plain
from sglmoe.memory.staging import slot_bytes
from sglmoe.packed_checkpoint import FOLDER, layer_path
from sglmoe.plan.model_shape import Model
from sglmoe.plan.packed import stored_bytes_of
from sglmoe.worker.packed_experts import use_packed

PLAIN_BYTES = 3 * TENSOR_BYTES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = make_checkpoint(tmp_path / "model")
    assert pack.main(["--model-path", str(folder)]) == 0
    return folder


def model_in(folder: Path, *, num_layers: int = 2, dtype: str = "bfloat16") -> Model:
    shape = msgspec.structs.replace(
        TINY,
        num_layers=num_layers,
        num_moe_layers=num_layers,
        num_experts=2,
        expert_bytes=PLAIN_BYTES,
        format=Plain(dtype),
    )
    shards = tuple(sorted(folder.glob("*.safetensors")))
    return Model(name=str(folder), shape=shape, folder=folder, shards=shards)


def planned(folder: Path, wanted: str = "auto", **its: str | int) -> int:
    return stored_bytes_of(model_in(folder, **its), wanted, "cuda")  # type: ignore[arg-type]


def test_the_largest_is_as_large_as_in_the_server(tmp_path: Path) -> None:
    """One expert has more escapes than the others."""
    folder = make_checkpoint(tmp_path / "uneven")
    tensors = load_file(folder / "2.safetensors")
    tensors[name_of(1, 0, "w3")].view(-1)[:300] = 0
    save_file(tensors, folder / "2.safetensors")
    assert pack.main(["--model-path", str(folder)]) == 0
    store = load_store(folder)
    use_packed(store, "auto", str(folder))
    sizes = [
        sum(slot_bytes(part.stored_bytes) for part in store.stored_parts(*expert))
        for expert in store.experts()
    ]
    assert len(set(sizes)) > 1
    assert planned(folder) == max(sizes) == store.stored_expert_bytes() < 0.76 * PLAIN_BYTES
    assert planned(folder, "on") == planned(folder, str(folder / FOLDER)) == planned(folder)


def test_where_a_layer_is_not_packed_the_largest_is_as_it_is(folder: Path) -> None:
    layer_path(folder / FOLDER, 1).unlink()
    store = load_store(folder)
    use_packed(store, "auto", str(folder))
    assert planned(folder) == store.stored_expert_bytes() == PLAIN_BYTES


def test_layers_that_the_model_has_not_do_not_count(folder: Path) -> None:
    """As the one of DeepSeek-V3 that predicts a token ahead."""
    assert planned(folder, num_layers=1) < 0.72 * PLAIN_BYTES
    layer_path(folder / FOLDER, 0).unlink()
    assert planned(folder, num_layers=1) == PLAIN_BYTES


def test_without_packed_experts_nothing_is_counted(folder: Path, tmp_path: Path) -> None:
    assert planned(folder, "off") == 0
    assert planned(folder, dtype="float16") == 0  # then none is a view of the checkpoint
    assert stored_bytes_of(model_in(folder), "auto", "cpu") == 0
    assert planned(make_checkpoint(tmp_path / "plain")) == 0


def test_what_a_server_would_refuse_is_refused(folder: Path, tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"--packed-experts=on: there are none in "):
        planned(plain, "on")
    with pytest.raises(ValueError, match="since it was packed"):
        planned(plain, str(folder / FOLDER))
    with pytest.raises(ValueError, match="another --dtype"):
        planned(folder, "on", dtype="float16")
