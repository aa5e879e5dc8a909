"""Packed experts on their way to a device: staged, then decoded tensor by tensor, many experts at once. On a CPU, with the
reference decoder in the kernel's place.

The experts of `test_packed_store`, in frames a little larger than they; expert 1's last tensor is stored raw.
"""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from test_device_transfer import Stream
from test_packed_store import EXPERT_BYTES, TENSOR_BYTES, Bench

from sglmoe.kernels.exponent_codec.layout import read_layout
from sglmoe.kernels.exponent_codec.reference import decode_reference
from sglmoe.memory.decode_ratio import DecodeRatio
from sglmoe.memory.device_decode import (
    DecodedFrames,
    PlainFrames,
    can_decode,
    pieces_of,
    staged_bytes,
)
from sglmoe.memory.device_transfer import DeviceCopier, StreamCopier
from sglmoe.memory.experts import Load, PackedCell
from sglmoe.memory.host_tier import HostTier, make_blocks
from sglmoe.memory.load_timer import LoadTimer, device_copy_seconds, device_decoding_seconds
from sglmoe.memory.promotion import Promotion
from sglmoe.memory.store import ExpertReadError, ExpertStore

NUM_FRAMES = 3
FRAME_BYTES = EXPERT_BYTES + 32


class Decoder:
    """As `decode_tensors`, and keeps count."""

    def __init__(self) -> None:
        self.launches: list[int] = []  # tensors of each

    def __call__(
        self,
        packed: torch.Tensor,
        sources: torch.Tensor,
        target: torch.Tensor,
        targets: torch.Tensor,
        *,
        num_values: int,
    ) -> None:
        self.launches.append(sources.numel())
        for source, place in zip(sources.tolist(), targets.tolist(), strict=True):
            assert source % 16 == place % 8 == 0
            tensor = packed[source:].numpy()
            values = decode_reference(tensor[: read_layout(tensor).nbytes])
            assert values.size == num_values
            target[place : place + num_values] = torch.from_numpy(values.view(np.int16))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def stored(store: ExpertStore, expert: int) -> torch.Tensor:
    block = np.zeros(store.stored_expert_bytes(), np.uint8)
    store.read_stored(0, expert, block, before_chunk=lambda: None)
    return torch.from_numpy(block)


def put(frames: DecodedFrames, store: ExpertStore, load: Load) -> None:
    source = stored(store, load.expert)
    frames.place(load, source.numel()).copy_(source)


def test_experts_are_decoded_together_tensor_by_tensor(bench: Bench) -> None:
    arena = torch.full((NUM_FRAMES, FRAME_BYTES), 170, dtype=torch.uint8)
    decoder = Decoder()
    frames = DecodedFrames(arena, bench.store, decode=decoder)
    put(frames, bench.store, Load(2, 0, 0))
    put(frames, bench.store, Load(0, 0, 1))
    assert arena.eq(170).all()
    frames.flush()
    assert decoder.launches == [2, 2, 2]
    filling = bytes([170] * 32)
    for frame, expert in ((2, 0), (0, 1)):
        assert arena[frame].numpy().tobytes() == bench.expert(expert) + filling
    assert arena[1].eq(170).all()
    frames.flush()
    assert len(decoder.launches) == 3  # nothing new, nothing decoded


def test_when_the_staging_area_is_full_it_is_decoded_and_used_again(bench: Bench) -> None:
    arena = torch.zeros((NUM_FRAMES, FRAME_BYTES), dtype=torch.uint8)
    decoder = Decoder()
    frames = DecodedFrames(arena, bench.store, num_staged=2, decode=decoder)
    for frame, expert in enumerate((1, 0, 1)):
        put(frames, bench.store, Load(frame, 0, expert))
    frames.flush()
    assert decoder.launches == [2, 2, 2, 1, 1, 1]
    for frame, expert in enumerate((1, 0, 1)):
        assert arena[frame, :EXPERT_BYTES].numpy().tobytes() == bench.expert(expert)


def test_what_is_forgotten_is_never_decoded(bench: Bench) -> None:
    arena = torch.full((NUM_FRAMES, FRAME_BYTES), 170, dtype=torch.uint8)
    frames = DecodedFrames(arena, bench.store, decode=Decoder())
    put(frames, bench.store, Load(0, 0, 0))
    frames.forget()
    put(frames, bench.store, Load(1, 0, 1))
    frames.flush()
    assert arena[0].eq(170).all()
    assert arena[1, :EXPERT_BYTES].numpy().tobytes() == bench.expert(1)


def test_a_tensor_that_is_not_packed_is_copied_from_the_staging_area(bench: Bench) -> None:
    bench.store._parts[0, 0, "w3"] = np.arange(TENSOR_BYTES, dtype=np.uint32).astype(np.uint8)
    arena = torch.zeros((NUM_FRAMES, FRAME_BYTES), dtype=torch.uint8)
    decoder = Decoder()
    frames = DecodedFrames(arena, bench.store, decode=decoder)
    for frame, expert in enumerate((0, 1)):
        put(frames, bench.store, Load(frame, 0, expert))
    frames.flush()
    assert decoder.launches == [2, 1, 2]
    for frame, expert in enumerate((0, 1)):
        target = np.zeros(EXPERT_BYTES, np.uint8)
        bench.store.read(0, expert, target)
        assert arena[frame, :EXPERT_BYTES].numpy().tobytes() == target.tobytes()


def test_what_is_not_packed_goes_straight_to_its_frame() -> None:
    arena = torch.full((2, 8), 170, dtype=torch.uint8)
    frames = PlainFrames(arena)
    frames.place(Load(1, 0, 0), 6).copy_(torch.arange(6, dtype=torch.uint8))
    frames.flush()
    assert arena.tolist() == [[170] * 8, [0, 1, 2, 3, 4, 5, 170, 170]]


def test_only_frames_that_the_kernel_can_write_to_are_decoded_into(bench: Bench) -> None:
    assert can_decode(bench.store, FRAME_BYTES)
    assert not can_decode(bench.store, FRAME_BYTES + 8)
    bench.store._parts[0, 0, "w1"] = np.zeros(TENSOR_BYTES + 2, np.uint8)
    assert not can_decode(bench.store, FRAME_BYTES)
    plain = ExpertStore()
    for part in ("w1", "w3", "w2"):
        plain.put(0, 0, part, np.zeros(16, np.uint8))
    assert not can_decode(plain, FRAME_BYTES)


# ------------------------------------------------------------------------------ cells of the arena


@pytest.mark.parametrize(
    ("start", "stop", "pieces"),
    [
        (0, 10, [(30, 34), (10, 16)]),
        (0, 4, [(30, 34)]),
        (4, 9, [(10, 15)]),
        (3, 5, [(33, 34), (10, 11)]),
        (5, 5, []),
    ],
)
def test_a_part_of_a_cell_is_where_its_runs_are(
    start: int, stop: int, pieces: list[tuple[int, int]]
) -> None:
    assert pieces_of([(30, 34), (10, 16)], start, stop) == pieces


def test_runs_that_are_neighbours_are_one_piece() -> None:
    assert pieces_of([(30, 34), (34, 40)], 1, 10) == [(31, 40)]


class Cells:
    """Frame 0 is what experts are loaded into. The first tensor of the cell lies in frames 2 and 1, others in 1; or, as
    neighbours, in frames 1 and 2."""

    def __init__(self, bench: Bench, *, are_neighbours: bool = False, num_staged: int = 2):
        self.bench = bench
        self.arena = torch.full((NUM_FRAMES, FRAME_BYTES), 170, dtype=torch.uint8)
        self.decoder = Decoder()
        self.frames = DecodedFrames(
            self.arena, bench.store, num_staged=num_staged, decode=self.decoder
        )
        rest = staged_bytes(bench.store) - 4800
        first, second = (1, 2) if are_neighbours else (2, 1)
        stop = (first + 1) * FRAME_BYTES
        self.runs = ((stop - 4800, stop), (second * FRAME_BYTES, second * FRAME_BYTES + rest))

    def load(self, expert: int, *, is_filled: bool) -> Load:
        return Load(0, 0, expert, PackedCell(self.runs, is_filled))

    def frame(self) -> bytes:
        return self.arena[0, :EXPERT_BYTES].numpy().tobytes()

    def untouched(self) -> torch.Tensor:
        """Everything outside of the cell and the expert's bytes."""
        is_other = torch.ones(self.arena.numel(), dtype=torch.bool)
        is_other[:EXPERT_BYTES] = False
        for start, stop in self.runs:
            is_other[start:stop] = False
        return self.arena.view(-1)[is_other]


@pytest.mark.parametrize("expert", [0, 1])
@pytest.mark.parametrize("are_neighbours", [False, True])
def test_an_expert_is_kept_as_it_comes_and_decoded_from_its_cell(
    bench: Bench, expert: int, are_neighbours: bool
) -> None:
    cells = Cells(bench, are_neighbours=are_neighbours)
    put(cells.frames, bench.store, cells.load(expert, is_filled=False))
    cells.frames.flush()
    assert cells.frame() == bench.expert(expert)
    cells.arena[0] = 170
    bench.packed.write_bytes(b"")
    bench.original.write_bytes(b"")
    cells.frames._staging[:] = 0
    cells.frames.unpack(cells.load(expert, is_filled=True))
    cells.frames.flush()
    assert cells.frame() == bench.expert(expert)
    assert cells.untouched().eq(170).all()
    assert cells.decoder.launches == [1] * 6


def test_only_what_lies_in_two_frames_takes_room_in_the_staging_area(bench: Bench) -> None:
    cells = Cells(bench, num_staged=1)
    put(cells.frames, bench.store, cells.load(0, is_filled=False))
    cells.frames.flush()
    cells.decoder.launches.clear()
    cells.frames.unpack(cells.load(0, is_filled=True))
    cells.frames.unpack(cells.load(0, is_filled=True))  # no row is free: the first is decoded
    assert cells.decoder.launches == [1, 1, 1]
    whole = Cells(bench, are_neighbours=True, num_staged=1)
    put(whole.frames, bench.store, whole.load(0, is_filled=False))
    whole.frames.flush()
    whole.decoder.launches.clear()
    for _ in range(3):
        whole.frames.unpack(whole.load(0, is_filled=True))
    whole.frames.flush()
    assert whole.decoder.launches == [3, 3, 3]


def test_what_is_forgotten_is_not_kept_either(bench: Bench) -> None:
    cells = Cells(bench)
    put(cells.frames, bench.store, cells.load(0, is_filled=False))
    cells.frames.forget()
    cells.frames.flush()
    assert cells.arena.eq(170).all()


def test_a_tensor_that_is_not_packed_is_copied_from_the_cell(bench: Bench) -> None:
    bench.store._parts[0, 0, "w3"] = np.arange(TENSOR_BYTES, dtype=np.uint32).astype(np.uint8)
    cells = Cells(bench)
    put(cells.frames, bench.store, cells.load(0, is_filled=False))
    cells.frames.flush()
    cells.arena[0] = 170
    cells.frames.unpack(cells.load(0, is_filled=True))
    cells.frames.flush()
    target = np.zeros(EXPERT_BYTES, np.uint8)
    bench.store.read(0, 0, target)
    assert cells.frame() == target.tobytes()


class Clock:
    """Timers that are recorded at times that are told; `record` reads the next one, in ms."""

    def __init__(self, *times: float):
        self.times = list(times)

    def new_timer(self) -> "ClockTimer":
        return ClockTimer(self)


class Tick:
    """A timer that leaves a 0 among the launches."""

    def __init__(self, launches: list[int]):
        self._launches = launches

    def record(self) -> None:
        self._launches.append(0)


class ClockTimer:
    def __init__(self, clock: Clock):
        self._clock = clock
        self.at = 0.0

    def record(self) -> None:
        self.at = self._clock.times.pop(0)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "ClockTimer") -> float:
        return end.at - self.at


def test_decoding_is_timed_before_anything_is_served(bench: Bench) -> None:
    """The least of 5, 2 and 3 ms; the first decoding of all, which compiles, is not among them."""
    cells = Cells(bench)
    clock = Clock(0, 5, 10, 12, 20, 23)
    assert device_decoding_seconds(cells.frames, bench.store, clock.new_timer) == 0.002
    assert cells.decoder.launches == [1] * 12
    assert cells.arena[1, :EXPERT_BYTES].numpy().tobytes() == bench.expert(0)
    assert cells.arena[2].eq(170).all()


def test_copying_is_timed_likewise() -> None:
    frame, block = torch.zeros(16, dtype=torch.uint8), torch.full((12,), 7, dtype=torch.uint8)
    clock = Clock(0, 5, 10, 12, 20, 23)
    assert device_copy_seconds(frame, block, clock.new_timer) == 0.002
    assert frame.tolist() == [7] * 12 + [0] * 4


# ------------------------------------------------------------------------------- with the copiers


class Device:
    """Two copiers over one arena; expert 1 is in host memory, expert 0 on disk."""

    def __init__(self, bench: Bench):
        self.arena = torch.full((NUM_FRAMES, FRAME_BYTES), 170, dtype=torch.uint8)
        blocks = make_blocks(10 * EXPERT_BYTES, bench.store, as_stored=True)
        self.tier = HostTier(blocks, num_layers=1, num_experts=2, as_stored=True)
        block = self.tier.begin(Promotion(0, 1))
        assert block is not None
        self.tier.finish(block, bench.store.read_stored(0, 1, blocks[block]))
        self.decoder = Decoder()
        self.log: list[str] = []
        common = {
            "arena": self.arena.view(-1),
            "frame_bytes": FRAME_BYTES,
            "store": bench.store,
            "tier": self.tier,
            "on_stream": lambda stream: nullcontext(),
            "lock_pages": lambda blocks: None,
        }
        demand = Stream("demand", [])
        self.copier = DeviceCopier(
            **common,
            into=DecodedFrames(self.arena, bench.store, decode=self.decoder),
            stream=demand,
            compute=Stream("compute", self.log),
            new_event=demand.new_event,
        )
        self.prefetcher = StreamCopier(
            **common,
            new_into=lambda: DecodedFrames(
                self.arena, bench.store, num_staged=1, decode=self.decoder
            ),
            stream=Stream("prefetch", self.log),
            new_event=demand.new_event,
        )

    def frame(self, number: int) -> bytes:
        return self.arena[number, :EXPERT_BYTES].numpy().tobytes()


def test_what_is_packed_in_the_arena_comes_from_there_behind_the_others(bench: Bench) -> None:
    """Expert 1 from host memory, then expert 0, which is packed in frame 2, without a look at disk or host memory."""
    device = Device(bench)
    cell = PackedCell(((2 * FRAME_BYTES, 2 * FRAME_BYTES + staged_bytes(bench.store)),), False)
    device.copier.load([Load(0, 0, 0, cell)])
    assert device.frame(0) == bench.expert(0)
    bench.packed.write_bytes(b"")
    bench.original.write_bytes(b"")
    device.arena[0] = 170
    device.decoder.launches.clear()
    device.copier._timer = LoadTimer(DecodeRatio(), lambda: Tick(device.decoder.launches))
    filled = PackedCell(cell.runs, is_filled=True)
    device.copier.load([Load(0, 0, 0, filled), Load(1, 0, 1)])
    assert (device.frame(0), device.frame(1)) == (bench.expert(0), bench.expert(1))
    assert device.decoder.launches == [0, 1, 1, 1, 0, 0, 1, 1, 1, 0], "each is timed by itself"
    counters = device.tier.counters()
    assert (counters["host_hits"], counters["disk_reads"]) == (1, 1)


def test_a_layers_experts_are_decoded_at_once_wherever_they_come_from(bench: Bench) -> None:
    device = Device(bench)
    device.copier.load([Load(0, 0, 1), Load(1, 0, 0), Load(2, 0, 1)])
    assert [device.frame(number) for number in range(3)] == [*map(bench.expert, (1, 0, 1))]
    assert device.decoder.launches == [3, 3, 3]
    counters = device.tier.counters()
    assert (counters["host_hits"], counters["disk_reads"]) == (2, 1)
    assert counters["disk_bytes"] == sum(bench.sizes[:3])


@pytest.mark.parametrize("expert", [0, 1], ids=["from disk", "from host memory"])
def test_a_prefetched_expert_is_decoded_before_it_is_there(bench: Bench, expert: int) -> None:
    device = Device(bench)
    device.prefetcher.copy(Load(1, 0, expert), device.prefetcher.mark(), lambda: None)
    assert device.frame(1) == bench.expert(expert)
    assert device.log == ["prefetch waits for 3", "prefetch is done"]


def test_two_prefetches_at_a_time_are_staged_apart(bench: Bench) -> None:
    """A layer needs an expert while the thread is held up in front of another one's first chunk."""
    device = Device(bench)
    asked: list[int] = []

    def before_chunk() -> None:
        asked.append(1)
        if len(asked) == 1:
            device.prefetcher.copy(Load(0, 0, 1), device.prefetcher.mark(), lambda: None)

    device.prefetcher.copy(Load(1, 0, 1), device.prefetcher.mark(), before_chunk)
    assert device.frame(0) == device.frame(1) == bench.expert(1)


def test_a_prefetch_that_is_given_up_is_not_decoded_later(bench: Bench) -> None:
    def leave() -> None:
        raise InterruptedError

    device = Device(bench)
    with pytest.raises(InterruptedError):
        device.prefetcher.copy(Load(2, 0, 1), device.prefetcher.mark(), leave)
    device.prefetcher.copy(Load(1, 0, 1), device.prefetcher.mark(), lambda: None)
    assert device.arena[2].eq(170).all()
    assert device.frame(1) == bench.expert(1)


def test_a_read_that_fails_leaves_nothing_to_decode_later(bench: Bench) -> None:
    device = Device(bench)
    bench.packed.write_bytes(b"")
    bench.original.write_bytes(b"")
    with pytest.raises(ExpertReadError, match="the file ends 8192 bytes early"):
        device.copier.load([Load(0, 0, 1), Load(1, 0, 0)])
    device.arena[:] = 170
    device.copier.load([Load(2, 0, 1)])
    assert device.arena[:2].eq(170).all()
    assert device.frame(2) == bench.expert(1)
