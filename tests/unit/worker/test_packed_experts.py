"""Which packed experts a server uses: those of its own checkpoint, whole and sound, if it is to."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_packed import TENSOR_BYTES, load_store, make_checkpoint, name_of

from sglmoe import pack
from sglmoe.memory.decode_ratio import DecodeRatio
from sglmoe.memory.packed_order import NO_PACKING, Packing
from sglmoe.memory.store import PARTS, ExpertStore
from sglmoe.packed_checkpoint import FOLDER, layer_path
from sglmoe.worker.packed_experts import decoding_seconds, plan_packing, use_packed

ALL_BYTES = 2 * 2 * 3 * TENSOR_BYTES
LAYER_BYTES = ALL_BYTES // 2


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = make_checkpoint(tmp_path / "model")
    assert pack.main(["--model-path", str(model)]) == 0
    return model


def check_reads(store: ExpertStore, model: Path) -> None:
    """All experts, the bits of the checkpoint."""
    for layer, shard in enumerate(("1.safetensors", "2.safetensors")):
        tensors = load_file(model / shard)
        for expert in range(2):
            target = np.zeros(3 * TENSOR_BYTES, np.uint8)
            store.read(layer, expert, target)
            whole = torch.cat([tensors[name_of(layer, expert, part)].view(-1) for part in PARTS])
            assert target.tobytes() == whole.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_packed_experts_beside_the_checkpoint_are_used(
    model: Path, wanted: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = load_store(model)
    with caplog.at_level(logging.INFO):
        use_packed(store, wanted, str(model))
    check_reads(store, model)
    assert store.stored_total_bytes() < 0.72 * ALL_BYTES
    assert f"packed experts of 2 layers in {model / FOLDER}: all experts take " in caplog.text
    assert "instead of 96.00 KiB" in caplog.text


def test_off_is_off(model: Path) -> None:
    store = load_store(model)
    use_packed(store, "off", str(model))
    assert store.stored_total_bytes() == ALL_BYTES


def test_a_folder_elsewhere_is_used_by_name(model: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (model / FOLDER).rename(elsewhere)
    store = load_store(model)
    use_packed(store, "auto", str(model))
    assert store.stored_total_bytes() == ALL_BYTES
    use_packed(store, str(elsewhere), str(model))
    assert store.stored_total_bytes() < 0.72 * ALL_BYTES
    check_reads(store, model)


def test_a_link_to_the_checkpoint_is_the_checkpoint(model: Path, tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in model.iterdir():
        (snapshot / path.name).symlink_to(path)
    store = load_store(snapshot)
    use_packed(store, "on", str(snapshot))
    assert store.stored_total_bytes() < 0.72 * ALL_BYTES


def test_layers_that_are_not_packed_are_read_as_they_are(model: Path) -> None:
    layer_path(model / FOLDER, 1).unlink()
    store = load_store(model)
    use_packed(store, "on", str(model))
    assert LAYER_BYTES < store.stored_total_bytes() < LAYER_BYTES * 1.72
    check_reads(store, model)


def change_second_shard(model: Path) -> str:
    tensors = load_file(model / "2.safetensors")
    save_file({name: -tensor for name, tensor in tensors.items()}, model / "2.safetensors")
    return "2.safetensors has been written to, or copied, since it was packed"


def cut_second_layer(model: Path) -> str:
    path = layer_path(model / FOLDER, 1)
    path.write_bytes(path.read_bytes()[:-10])
    return f"{path} is cut short"


@pytest.mark.parametrize("spoil", [change_second_shard, cut_second_layer])
def test_what_does_not_match_is_left_out_with_a_warning_or_refused_where_it_was_asked_for(
    model: Path,
    spoil,  # type: ignore[no-untyped-def]
    caplog: pytest.LogCaptureFixture,
) -> None:
    why = spoil(model)
    store = load_store(model)
    with pytest.raises(ValueError, match=why):
        use_packed(store, "on", str(model))
    use_packed(store, "auto", str(model))
    assert f"packed experts are not used: {layer_path(model / FOLDER, 1)}" in caplog.text
    assert why in caplog.text
    assert LAYER_BYTES < store.stored_total_bytes() < LAYER_BYTES * 1.72
    check_reads(store, model)


def test_none_are_no_error_unless_asked_for(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    for layer in range(2):
        layer_path(model / FOLDER, layer).unlink()
    store = load_store(model)
    use_packed(store, "auto", str(model))
    assert caplog.text == ""
    with pytest.raises(ValueError, match=r"--packed-experts=on: there are none in .*sglmoe.pack"):
        use_packed(store, "on", str(model))


def test_another_dtype_than_the_checkpoints_has_nothing_packed(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = load_store(model, dtype=torch.float16)
    use_packed(store, "auto", str(model))
    assert "packed experts are not used: the model's experts are not read" in caplog.text
    with pytest.raises(ValueError, match="another --dtype"):
        use_packed(store, "on", str(model))


# ------------------------------------------------------------------------------- packed in the arena


def plan(
    store: ExpertStore,
    share: float | None,
    ratio: DecodeRatio,
    *,
    time_decoding: Callable[[], float] | None = lambda: 0.001,
) -> Packing:
    return plan_packing(
        store, share, ratio, frame_bytes=3 * TENSOR_BYTES, time_decoding=time_decoding
    )


def test_packed_experts_may_stay_in_frames_where_they_are_smaller(model: Path) -> None:
    store, ratio = load_store(model), DecodeRatio()
    use_packed(store, "on", str(model))
    for share in (None, 0.3):
        packing = plan(store, share, ratio)
        assert packing == Packing(store.stored_expert_bytes(), ratio, share)
    ratio.note(1000.0, is_decoded=False)
    assert ratio() == pytest.approx(1e-6), "decoding is timed before anything is served"
    assert 0 < decoding_seconds(store) < 1
    assert plan(store, 0.0, ratio) == NO_PACKING


def test_without_packed_experts_a_share_is_refused_and_auto_is_none(model: Path) -> None:
    store, ratio = load_store(model), DecodeRatio()
    assert plan(store, None, ratio) == NO_PACKING
    message = r"--packed-share=30%: the largest expert takes 24576 bytes as it is read, a frame 24576; pack them with"
    with pytest.raises(ValueError, match=message):
        plan(store, 0.3, ratio)


def test_nor_where_a_device_can_not_decode_into_frames(model: Path) -> None:
    store, ratio = load_store(model), DecodeRatio()
    use_packed(store, "on", str(model))
    assert plan(store, None, ratio, time_decoding=None) == NO_PACKING
    with pytest.raises(ValueError, match="of 24576 bytes, begin where a GPU does not decode to"):
        plan(store, 0.3, ratio, time_decoding=None)
