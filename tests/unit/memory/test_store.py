"""Where experts that are not resident are found."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from sglmoe.memory import store as store_module
from sglmoe.memory.checkpoint_form import Converted
from sglmoe.memory.mapped_files import Extent
from sglmoe.memory.store import Bytes, ExpertReadError, ExpertStore


def some_bytes(size: int) -> Bytes:
    return np.zeros(size, np.uint8)


def test_parts_lie_gate_up_down_whatever_the_order_of_the_checkpoint() -> None:
    store = ExpertStore()
    gate, up, down = some_bytes(6), some_bytes(6), some_bytes(8)
    store.put(0, 0, "w2", down)
    store.put(0, 0, "w3", up)
    store.put(0, 0, "w1", gate)
    parts = store.parts(0, 0)
    assert [offset for offset, _ in parts] == [0, 6, 12]
    # References, not copies: a mapped checkpoint is never held twice.
    assert parts[0][1] is gate
    assert parts[1][1] is up
    assert parts[2][1] is down
    assert store.expert_bytes() == store.total_bytes == 20


def test_reading_an_expert_fills_the_start_of_its_target() -> None:
    store = ExpertStore()
    for part, value in (("w2", 3), ("w1", 1), ("w3", 2)):
        store.put(1, 7, part, np.full(2, value, np.uint8))
    target = np.full(8, 9, np.uint8)
    assert store.read(1, 7, target) == 6
    assert target.tolist() == [1, 1, 2, 2, 3, 3, 9, 9]
    assert store.experts() == [(1, 7)]


def test_an_expert_may_be_laid_out_otherwise() -> None:
    """Weights, and scales at a multiple of 4 behind them: what lies between is nobody's."""
    store = ExpertStore()
    store.lay_out({"w1": 0, "w3": 1, "w2": 2, "scale": 4})
    for part, value in (("scale", 4), ("w2", 3), ("w3", 2), ("w1", 1)):
        size = 4 if part == "scale" else 1
        store.put(0, 0, part, np.full(size, value, np.uint8))
    assert [offset for offset, _ in store.parts(0, 0)] == [0, 1, 2, 4]
    target = np.full(9, 9, np.uint8)
    assert store.read(0, 0, target) == store.total_bytes == 7
    assert target.tolist() == [1, 2, 3, 9, 4, 4, 4, 4, 9]
    assert store.expert_bytes() == 8  # so much of a frame
    store.put(0, 1, "w1", some_bytes(1))
    with pytest.raises(ValueError, match="layer 0 expert 1 w3 is missing"):
        store.check_complete(1, 2)
    for part in ("w3", "w2"):
        store.put(0, 1, part, some_bytes(1))
    with pytest.raises(ValueError, match="layer 0 expert 1 scale is missing"):
        store.check_complete(1, 2)


def test_a_frame_must_hold_the_largest_expert() -> None:
    store = ExpertStore()
    assert store.expert_bytes() == 0
    store.put(0, 0, "w1", some_bytes(4))
    store.put(1, 0, "w1", some_bytes(4))
    store.put(1, 0, "w2", some_bytes(3))
    assert store.expert_bytes() == 7
    assert store.total_bytes == 11


def test_an_incomplete_checkpoint_names_the_tensor() -> None:
    store = ExpertStore()
    for layer in range(2):
        for part in ("w1", "w3", "w2"):
            store.put(layer, 0, part, some_bytes(1))
    store.check_complete(2, 1)
    for part in ("w1", "w2"):
        store.put(0, 1, part, some_bytes(1))
    with pytest.raises(ValueError, match="layer 0 expert 1 w3 is missing from the checkpoint"):
        store.check_complete(2, 2)


def test_a_tensor_that_comes_twice_or_has_no_place_is_refused() -> None:
    store = ExpertStore()
    store.put(3, 5, "w2", some_bytes(1))
    with pytest.raises(ValueError, match="layer 3 expert 5 w2 is in the checkpoint twice"):
        store.put(3, 5, "w2", some_bytes(1))
    with pytest.raises(ValueError, match="layer 3 expert 5 has no tensor 'bias'"):
        store.put(3, 5, "bias", some_bytes(1))


def mapped_store(path: Path) -> ExpertStore:
    """One expert of 24 bytes 0, 1, 2, ... in a file."""
    path.write_bytes(bytes(range(24)))
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    store = ExpertStore()
    for index, part in enumerate(("w1", "w3", "w2")):
        store.put(2, 0, part, mapped[8 * index : 8 * index + 8])
    assert store.unmap() == 0
    return store


def test_a_file_cut_short_is_named_with_what_to_do_and_read_again_once_restored(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.safetensors"
    store = mapped_store(path)
    path.write_bytes(bytes(range(20)))
    target = np.zeros(24, np.uint8)
    message = (
        f"expert 0 of MoE layer 2 can't be read from {path}: the file ends 4 bytes early. The file was "
        "changed while being served, or its disk fails: restore the file and restart the server"
    )
    with pytest.raises(ExpertReadError) as raised:
        store.read(2, 0, target)
    assert str(raised.value) == message
    path.write_bytes(bytes(range(24)))
    assert store.read(2, 0, target) == 24
    assert target.tolist() == list(range(24))


def test_a_read_that_gives_way_does_so_before_each_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 3)
    store = mapped_store(tmp_path / "model.safetensors")
    store.put(2, 1, "w1", np.arange(100, 108, dtype=np.uint8))
    store.put(2, 1, "w3", some_bytes(0))
    store.put(2, 1, "w2", some_bytes(1))
    target = np.full(24, 255, np.uint8)
    seen: list[int] = []
    store.read(2, 0, target, before_chunk=lambda: seen.append(int((target < 255).sum())))
    assert seen == [0, 3, 6, 8, 11, 14, 16, 19, 22]
    assert target.tolist() == list(range(24))
    # Likewise from memory; and what it raises ends the read.
    seen.clear()
    store.read(2, 1, target, before_chunk=lambda: seen.append(0))
    assert len(seen) == 4
    assert target[:9].tolist() == [*range(100, 108), 0]
    with pytest.raises(KeyError):
        store.read(2, 0, target, before_chunk=lambda: {}["stop"])


def test_the_disk_is_asked_ahead_while_reads_are_as_slow_as_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Extent, "will_read", lambda self: asked.append(self.offset))
    now = [0.0]
    store = ExpertStore(clock=lambda: now[0])
    for key, part in mapped_store(tmp_path / "model.safetensors")._parts.items():
        store._parts[key] = part

    def read(seconds: float) -> None:
        """24 bytes; what passes meanwhile is the time that the file's read takes."""
        read_into = Extent.read_into

        def slow(self: Extent, target: memoryview, start: int = 0) -> None:
            now[0] += seconds / 3
            read_into(self, target, start)

        with monkeypatch.context() as patch:
            patch.setattr(Extent, "read_into", slow)
            store.read(2, 0, np.zeros(24, np.uint8))

    store.will_read(2, 0)
    assert asked == [0, 8, 16]
    read(seconds=1e-9)  # 24 GB/s: the page cache
    store.will_read(2, 0)
    assert asked == [0, 8, 16]
    read(seconds=1e-6)  # 24 MB/s
    store.will_read(2, 0)
    assert asked == [0, 8, 16] * 2


def test_experts_in_memory_need_no_reading_ahead(tmp_path: Path) -> None:
    store = mapped_store(tmp_path / "model.safetensors")
    for part in ("w1", "w3", "w2"):
        store.put(2, 1, part, some_bytes(1))
    store.will_read(2, 0)
    store.will_read(2, 1)


def test_a_mapped_expert_is_read_from_its_file_once_unmapped(tmp_path: Path) -> None:
    # The first expert lies in a file, w1, w3, w2 one behind the other; the second one in memory.
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(24)))
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    store = ExpertStore()
    for index, part in enumerate(("w1", "w3", "w2")):
        store.put(0, 0, part, mapped[8 * index : 8 * index + 8])
        store.put(0, 1, part, np.full(8, 100 + index, np.uint8))
    assert store.unmap() == 24
    target = np.zeros(24, np.uint8)
    assert store.read(0, 0, target) == 24
    assert target.tolist() == list(range(24))
    store.read(0, 1, target)
    assert target.tolist() == [100] * 8 + [101] * 8 + [102] * 8
    assert store.total_bytes == 48


def reversed_in_pairs(source: Bytes) -> Bytes:
    """As wide again: of byte 3, bytes 3 and 3; the last of the source first."""
    return np.repeat(source[::-1], 2)


def test_what_a_checkpoint_has_in_another_form_is_converted_each_time_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tensors of 3 bytes in the file, 6 in a frame; and one of our own memory."""
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 2)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(6)))
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    store = ExpertStore()
    for part, source in (("w1", mapped[:3]), ("w3", mapped[3:]), ("w2", some_bytes(1))):
        store.put(0, 0, part, Converted(source, 2 * source.nbytes, reversed_in_pairs))
    assert store.total_bytes == store.expert_bytes() == store.stored_expert_bytes() == 14
    expected = [2, 2, 1, 1, 0, 0, 5, 5, 4, 4, 3, 3, 0, 0]
    for held_bytes in (None, 1):  # views of the mapping, and then the file's own bytes
        if held_bytes is not None:
            assert store.unmap() == held_bytes
        target, chunks = np.full(16, 9, np.uint8), iter(range(2 + 2 + 1))  # of what is read
        assert store.read(0, 0, target, before_chunk=chunks.__next__) == 14
        assert next(chunks, None) is None
        assert target.tolist() == [*expected, 9, 9]
        stored = np.full(14, 9, np.uint8)
        assert store.read_stored(0, 0, stored) == 14
        assert store.unpack(0, 0, [stored], target) == 14
        assert target.tolist() == [*expected, 9, 9]
    asked: list[int] = []
    monkeypatch.setattr(Extent, "will_read", lambda self: asked.append(self.offset))
    store.will_read(0, 0)
    assert asked == [0, 3]
    path.write_bytes(bytes(5))
    with pytest.raises(ExpertReadError, match=f"from {path}: the file ends 1 bytes early"):
        store.read(0, 0, np.zeros(14, np.uint8))
