"""An expert store whose tensors lie packed in a second file: the same bytes, from fewer; damage is noticed.

One layer of two experts, three tensors of 4096 values each; expert 1's last tensor is noise and stored raw.
"""

import logging
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from sglmoe.kernels.exponent_codec.encode import encode
from sglmoe.kernels.exponent_codec.layout import read_layout
from sglmoe.memory import packed_extent
from sglmoe.memory.host_tier import HostTier, TieredStore, make_blocks
from sglmoe.memory.link_gate import LinkGate
from sglmoe.memory.mapped_files import Extent
from sglmoe.memory.packed_extent import PackedExtent, PackedPlace
from sglmoe.memory.promoter import Promoter
from sglmoe.memory.read_rate import ReadRate
from sglmoe.memory.staging import slot_bytes
from sglmoe.memory.store import PARTS, Bytes, ExpertReadError, ExpertStore

NUM_VALUES = 4096
TENSOR_BYTES = 2 * NUM_VALUES
EXPERT_BYTES = 3 * TENSOR_BYTES


def make_tensors() -> Bytes:
    """Of both experts: uint8 `[6 * TENSOR_BYTES]`."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6 * NUM_VALUES, generator=generator).to(torch.bfloat16)
    content = values.view(torch.uint8).numpy()
    content[-TENSOR_BYTES:] = np.random.default_rng(0).integers(0, 256, TENSOR_BYTES, np.uint8)
    return content


class Bench:
    """The store, its two files and what is in them."""

    def __init__(self, folder: Path):
        self.content = make_tensors()
        self.original, self.packed = folder / "model.safetensors", folder / "layer.packed"
        self.original.write_bytes(self.content.tobytes())
        self.store = ExpertStore()
        with self.original.open("rb") as file:
            mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        for number in range(6):
            expert, part = divmod(number, 3)
            view = mapped[number * TENSOR_BYTES :][:TENSOR_BYTES]
            self.store.put(0, expert, PARTS[part], view)
        del mapped, view
        assert self.store.unmap() == 0
        self.sizes: list[int] = []
        assert self.store.use_packed(self.pack()) == 6

    def pack(self) -> dict[tuple[str, int], PackedPlace]:
        places, offset = {}, 0
        with self.packed.open("wb") as file:
            descriptor = os.open(self.packed, os.O_RDONLY)
            for start in range(0, self.content.nbytes, TENSOR_BYTES):
                tensor = self.content[start : start + TENSOR_BYTES]
                packed = encode(torch.from_numpy(tensor).view(torch.int16)).numpy()
                file.write(packed.tobytes())
                extent = Extent(descriptor, offset, packed.nbytes, str(self.packed))
                checksum = xxhash.xxh3_64_intdigest(packed)
                key = (str(self.original), start)
                places[key] = PackedPlace(extent, checksum, TENSOR_BYTES)
                offset += packed.nbytes
                self.sizes.append(packed.nbytes)
        return places

    def expert(self, expert: int) -> bytes:
        return self.content[expert * EXPERT_BYTES :][:EXPERT_BYTES].tobytes()

    def read(self, expert: int) -> bytes:
        target = np.full(EXPERT_BYTES + 2, 170, np.uint8)
        assert self.store.read(0, expert, target) == EXPERT_BYTES
        assert target[-2:].tolist() == [170, 170]
        return target[:-2].tobytes()

    def flip_a_bit(self, offset: int) -> None:
        """In the packed file, which is open already."""
        with self.packed.open("r+b") as file:
            file.seek(offset)
            (was,) = file.read(1)
            file.seek(offset)
            file.write(bytes([was ^ 16]))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_experts_are_read_from_fewer_bytes(bench: Bench) -> None:
    bench.original.write_bytes(bytes(bench.content.nbytes))  # so they come from nowhere else
    for expert in range(2):
        assert bench.read(expert) == bench.expert(expert)
    assert bench.sizes[5] == TENSOR_BYTES + 16  # noise
    assert max(bench.sizes[:5]) < 0.72 * TENSOR_BYTES
    assert bench.store.total_bytes == 2 * EXPERT_BYTES
    assert bench.store.stored_total_bytes() == sum(bench.sizes)
    assert bench.store.stored_expert_bytes() == sum(map(slot_bytes, bench.sizes[3:]))
    assert bench.store.expert_bytes() == EXPERT_BYTES


def test_a_slow_disk_is_asked_ahead_and_waited_for_by_packed_bytes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(
        Extent, "will_read", lambda extent: asked.append((extent.path, extent.nbytes))
    )
    bench.store.will_read(0, 0)
    assert asked == [(str(bench.packed), size) for size in bench.sizes[:3]]
    slept: list[float] = []
    rate = ReadRate(bytes_per_second=1.0, clock=lambda: 0.0, sleep=slept.append)
    bench.store._rate = rate
    bench.read(0)
    assert slept[-1] == sum(bench.sizes[:3])


def test_only_tensors_that_lie_where_one_was_packed_are_read_packed(bench: Bench) -> None:
    places = bench.pack()
    keys = list(places)
    store = ExpertStore()
    descriptor = os.open(bench.original, os.O_RDONLY)
    path = str(bench.original)
    store._parts = {
        (0, 0, "w1"): Extent(descriptor, *keys[0][1:], TENSOR_BYTES, path),
        (0, 0, "w3"): Extent(descriptor, keys[1][1] + 2, TENSOR_BYTES, path),
        (0, 0, "w2"): Extent(descriptor, keys[2][1], TENSOR_BYTES - 2, path),
        (0, 1, "w1"): Extent(descriptor, keys[3][1], TENSOR_BYTES, "elsewhere"),
        (0, 1, "w3"): np.zeros(TENSOR_BYTES, np.uint8),
    }
    assert store.use_packed(places) == 1
    packed = [key for key, part in store._parts.items() if isinstance(part, PackedExtent)]
    assert packed == [(0, 0, "w1")]


@pytest.mark.parametrize("where", ["in the header", "in the head", "in the tiles", "in raw values"])
def test_a_flipped_bit_is_noticed_and_the_checkpoint_read_instead(
    bench: Bench, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    third = sum(bench.sizes[:3])
    places = {"in the header": third + 1, "in the head": third + 30, "in the tiles": third + 3000}
    bench.flip_a_bit(places.get(where, sum(bench.sizes) - 100))
    with caplog.at_level(logging.WARNING):
        assert bench.read(1) == bench.expert(1)
        assert bench.read(1) == bench.expert(1)
    (record,) = caplog.records  # once, not for every read
    assert f"{bench.packed} is damaged (" in record.getMessage()
    assert "run python -m sglmoe.pack again" in record.getMessage()


def test_a_read_that_is_given_up_is_no_damage(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def leave() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        bench.store.read(0, 0, np.zeros(EXPERT_BYTES, np.uint8), before_chunk=leave)
    bench.original.write_bytes(b"")
    assert bench.read(0) == bench.expert(0)
    assert caplog.records == []


def test_where_the_checkpoint_fails_too_that_is_the_error(bench: Bench) -> None:
    bench.flip_a_bit(3000)
    bench.original.write_bytes(bench.content[:100].tobytes())
    message = f"expert 0 of MoE layer 0 can't be read from .*: the file ends {TENSOR_BYTES - 100} bytes early"
    with pytest.raises(ExpertReadError, match=message):
        bench.store.read(0, 0, np.zeros(EXPERT_BYTES, np.uint8))


def test_a_read_that_gives_way_does_so_before_each_piece(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_extent, "PIECE_TILES", 1)
    target = np.zeros(EXPERT_BYTES, np.uint8)
    calls: list[bool] = []
    bench.store.read(0, 0, target, before_chunk=lambda: calls.append(target.any()))
    assert target.tobytes() == bench.expert(0)
    # Of each tensor header, head and two tiles.
    assert len(calls) == 3 * 4
    assert calls == [False] * 3 + [True] * 9
    with pytest.raises(KeyError):
        bench.store.read(0, 0, target, before_chunk=lambda: {}["stop"])


def test_a_raw_tensor_of_any_size_is_read_to_its_end(tmp_path: Path) -> None:
    """Ten bytes, and six that fill it up."""
    values = torch.tensor([1, -2, 300, -400, 5], dtype=torch.int16)
    packed = encode(values).numpy()
    path = tmp_path / "layer.packed"
    path.write_bytes(packed.tobytes())
    extent = Extent(os.open(path, os.O_RDONLY), 0, 32, str(path))
    checksum = xxhash.xxh3_64_intdigest(packed)
    tensor = PackedExtent(extent, checksum, original=Extent(-1, 0, 10, "none"))
    target = np.zeros(10, np.uint8)
    tensor.read_into(target, lambda num_bytes: None)
    assert target.view(np.int16).tolist() == values.tolist()


# ---------------------------------------------------------------------------------------- host memory


def fill(bench: Bench, tier: HostTier) -> int:
    """By the promoter, all that fits; how many experts came in."""
    promoter = Promoter(
        tier,
        bench.store,
        LinkGate(),
        heat=lambda: np.zeros((1, 2)),
        residents=lambda: np.zeros((1, 2), np.bool_),
    )
    return promoter.promote_some()


def test_host_memory_holds_experts_packed_and_hands_them_out_whole(bench: Bench) -> None:
    """In what one expert and a half takes whole, both fit."""
    host_bytes = EXPERT_BYTES * 3 // 2
    assert len(make_blocks(host_bytes, bench.store)) == 1
    block_bytes = sum(map(slot_bytes, bench.sizes[3:]))
    blocks = make_blocks(2 * block_bytes, bench.store, as_stored=True)
    assert blocks.shape == (2, block_bytes)
    assert 2 * sum(bench.sizes[:3]) < host_bytes
    tier = HostTier(blocks, num_layers=1, num_experts=2, as_stored=True)
    assert fill(bench, tier) == 2
    assert tier.counters()["host_promoted_bytes"] == sum(bench.sizes)
    tiered = TieredStore(tier, bench.store)
    bench.packed.write_bytes(b"")  # so they come from nowhere else
    bench.original.write_bytes(b"")
    for expert in range(2):
        for before_chunk in (None, lambda: None):
            target = np.full(EXPERT_BYTES + 2, 170, np.uint8)
            assert tiered.read(0, expert, target, before_chunk=before_chunk) == EXPERT_BYTES
            assert target.tobytes() == bench.expert(expert) + bytes([170, 170])
    assert tier.counters()["host_hits"] == 4
    assert tier.violations() == []


def test_tiles_are_whole_lines_of_a_block(bench: Bench) -> None:
    """128 bytes each. Of what is not coded, the values; what is not packed lies as it is."""
    expert = np.zeros(bench.store.stored_expert_bytes(), np.uint8)
    assert expert.nbytes % 128 == 0
    for number, parts in enumerate(bench.store.stored_parts(0, its) for its in range(2)):
        bench.store.read_stored(0, number, expert)
        for part in parts:
            packed = expert[part.stored_offset :][: part.stored_bytes]
            assert (part.stored_offset + read_layout(packed).tiles) % 128 == 0
    path = str(bench.original)
    bench.store._parts[0, 0, "w1"] = Extent(-1, 0, TENSOR_BYTES, path)
    plain, packed_part, _ = bench.store.stored_parts(0, 0)
    assert (plain.stored_offset, plain.stored_bytes) == (0, TENSOR_BYTES)
    end = packed_part.stored_offset + packed_part.stored_bytes
    assert end == TENSOR_BYTES + slot_bytes(packed_part.stored_bytes)


def test_decoding_from_host_memory_gives_way_before_each_piece(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_extent, "PIECE_TILES", 1)
    blocks = make_blocks(10 * EXPERT_BYTES, bench.store, as_stored=True)
    tier = HostTier(blocks, num_layers=1, num_experts=2, as_stored=True)
    assert fill(bench, tier) == 2
    tiered, target = TieredStore(tier, bench.store), np.zeros(EXPERT_BYTES, np.uint8)
    calls: list[bool] = []
    tiered.read(0, 0, target, before_chunk=lambda: calls.append(target.any()))
    assert calls == [False] * 3 + [True] * 9
    with pytest.raises(KeyError):
        tiered.read(0, 0, target, before_chunk=lambda: {}["stop"])
    assert tier.violations() == []
    assert tier._pins.tolist() == [0, 0]


def test_a_damaged_expert_is_packed_again_for_host_memory(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.flip_a_bit(3000)
    blocks = make_blocks(10 * EXPERT_BYTES, bench.store, as_stored=True)
    tier = HostTier(blocks, num_layers=1, num_experts=2, as_stored=True)
    assert fill(bench, tier) == 2
    assert f"{bench.packed} is damaged (its checksum is not" in caplog.text
    for expert in range(2):
        target = np.zeros(EXPERT_BYTES, np.uint8)
        TieredStore(tier, bench.store).read(0, expert, target)
        assert target.tobytes() == bench.expert(expert)


def test_what_was_packed_of_another_original_does_not_come_into_host_memory(
    bench: Bench,
) -> None:
    bench.flip_a_bit(3000)
    changed = bench.content.copy()
    changed[100] ^= 1
    bench.original.write_bytes(changed.tobytes())
    with pytest.raises(ExpertReadError, match="neither it nor its original is what was packed"):
        bench.store.read_stored(0, 0, np.zeros(EXPERT_BYTES, np.uint8))


def test_what_is_not_packed_is_kept_as_it_is(bench: Bench) -> None:
    """In blocks of stored experts, beside packed tensors."""
    bench.store._parts[0, 0, "w3"] = np.arange(TENSOR_BYTES, dtype=np.uint32).astype(np.uint8)
    tier = HostTier(
        make_blocks(10 * EXPERT_BYTES, bench.store, as_stored=True),
        num_layers=1,
        num_experts=2,
        as_stored=True,
    )
    assert fill(bench, tier) == 2
    target = np.zeros(EXPERT_BYTES, np.uint8)
    TieredStore(tier, bench.store).read(0, 0, target)
    whole = bench.expert(0)
    as_it_is = bytes(bench.store._parts[0, 0, "w3"])
    assert target.tobytes() == whole[:TENSOR_BYTES] + as_it_is + whole[2 * TENSOR_BYTES :]
