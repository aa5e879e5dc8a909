"""A tensor of a mapped file is found again as bytes of that file."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from sglmoe.memory.mapped_files import Extent, MappedFiles, UnreadableError


@pytest.fixture
def mapped(tmp_path: Path) -> np.ndarray:
    """10,000 bytes 0, 1, 2, ... 250, 0, ... of a file whose name has a space, mapped."""
    path = tmp_path / "a checkpoint.bin"
    path.write_bytes(bytes(i % 251 for i in range(10_000)))
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def test_a_view_of_a_mapping_is_read_from_the_file(mapped: np.ndarray) -> None:
    view = mapped[5_000:5_600]
    extent = MappedFiles().extent(view.ctypes.data, view.nbytes)
    assert extent is not None
    assert (extent.offset, extent.nbytes) == (5_000, 600)
    target = np.zeros(600, np.uint8)
    extent.read_into(memoryview(target))
    assert target.tolist() == view.tolist()


def test_heap_memory_is_no_file() -> None:
    array = np.arange(1000, dtype=np.uint8)
    assert MappedFiles().extent(array.ctypes.data, array.nbytes) is None


def test_a_range_that_leaves_the_mapping_is_no_extent(mapped: np.ndarray) -> None:
    end_of_page = mapped.ctypes.data + 12_288  # the mapping is three pages long
    assert MappedFiles().extent(end_of_page - 10, 20) is None


def test_a_file_that_became_shorter_is_an_error(mapped: np.ndarray) -> None:
    extent = MappedFiles().extent(mapped.ctypes.data, 100)
    assert extent is not None
    assert extent.path.endswith("a checkpoint.bin")
    beyond = Extent(extent.descriptor, offset=9_950, nbytes=100, path=extent.path)
    with pytest.raises(UnreadableError, match="ends 50 bytes early"):
        beyond.read_into(memoryview(bytearray(100)))
