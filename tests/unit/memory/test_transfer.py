"""Experts' bytes reach their frames and nothing else."""

from collections.abc import Iterator

import numpy as np
import pytest

from sglmoe.memory.experts import Load
from sglmoe.memory.store import Bytes, ExpertStore
from sglmoe.memory.transfer import HostCopier

FRAME_BYTES = 8  # the last of which no expert uses


@pytest.fixture
def arena() -> Bytes:
    return np.full(5 * FRAME_BYTES, 255, np.uint8)


@pytest.fixture(params=[0, 100], ids=["threads", "at once"])
def copier(arena: Bytes, request: pytest.FixtureRequest) -> Iterator[HostCopier]:
    store = ExpertStore()
    for expert in range(4):  # expert e is e, e, e+10, e+10, e+20, e+20, e+20
        for step, (part, size) in enumerate((("w1", 2), ("w3", 2), ("w2", 3))):
            store.put(0, expert, part, np.full(size, expert + 10 * step, np.uint8))
    copier = HostCopier(
        arena, frame_bytes=FRAME_BYTES, store=store, num_threads=2, small_bytes=request.param
    )
    yield copier
    copier.close()


def load(copier: HostCopier, *loads: Load) -> None:
    """To the end."""
    if finish := copier.load(loads):
        finish()


def test_one_expert(copier: HostCopier, arena: Bytes) -> None:
    load(copier, Load(frame=1, layer=0, expert=3))
    assert arena.reshape(5, FRAME_BYTES).tolist() == [
        [255] * 8,
        [3, 3, 13, 13, 23, 23, 23, 255],
        *[[255] * 8] * 3,
    ]
    assert copier.bytes_moved == 7


def test_several_experts_by_several_threads(copier: HostCopier, arena: Bytes) -> None:
    load(copier, *(Load(frame, 0, expert) for frame, expert in ((4, 0), (0, 1), (2, 2))))
    frames = arena.reshape(5, FRAME_BYTES)
    assert frames[:, 0].tolist() == [1, 255, 2, 255, 0]
    assert frames[:, 6].tolist() == [21, 255, 22, 255, 20]
    assert copier.bytes_moved == 21


def test_nothing_to_load(copier: HostCopier) -> None:
    load(copier)
    assert copier.bytes_moved == 0


@pytest.mark.parametrize("copier", [0], indirect=True, ids=["threads"])
def test_a_failure_is_raised_when_all_threads_are_done(copier: HostCopier, arena: Bytes) -> None:
    with pytest.raises(KeyError):
        load(copier, Load(0, 0, 9), Load(1, 0, 1), Load(2, 0, 9), Load(3, 0, 2))
    frames = arena.reshape(5, FRAME_BYTES)
    assert frames[1, 0] == 1
    assert frames[3, 0] == 2


@pytest.mark.parametrize("copier", [100], indirect=True, ids=["at once"])
def test_small_loads_are_there_at_once(copier: HostCopier, arena: Bytes) -> None:
    assert copier.load([Load(0, 0, 1)]) is None
    assert arena[0] == 1
    with pytest.raises(KeyError):
        copier.load([Load(0, 0, 9)])


def test_a_copy_in_the_background_can_be_ended(copier: HostCopier, arena: Bytes) -> None:
    calls = 0

    def before_chunk() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise InterruptedError

    copier.copy_in_background(Load(1, 0, 3), None, lambda: None)
    assert arena.reshape(5, FRAME_BYTES)[1].tolist() == [3, 3, 13, 13, 23, 23, 23, 255]
    with pytest.raises(InterruptedError):
        copier.copy_in_background(Load(2, 0, 3), None, before_chunk)
    assert arena.reshape(5, FRAME_BYTES)[2].tolist() == [3, 3, *[255] * 6]


def test_a_thread_asks_the_disk_for_a_few_experts_ahead(arena: Bytes) -> None:
    class Disk:
        def __init__(self) -> None:
            self.log: list[str] = []

        def will_read(self, layer: int, expert: int) -> None:
            self.log.append(f"will read {expert}")

        def read(self, layer: int, expert: int, target: Bytes) -> int:
            self.log.append(f"read {expert}")
            return 7

    disk = Disk()
    copier = HostCopier(arena, frame_bytes=FRAME_BYTES, store=disk, num_threads=1)
    copier.load([Load(frame % 5, 0, expert) for frame, expert in enumerate((9, 8, 7, 6, 5, 4))])
    copier.close()
    assert disk.log == [
        *["will read 9", "will read 8", "will read 7", "will read 6"],
        *["will read 5", "read 9", "will read 4", "read 8"],
        *["read 7", "read 6", "read 5", "read 4"],
    ]
