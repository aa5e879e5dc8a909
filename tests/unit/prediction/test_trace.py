"""A trace that is written and read again is the same, also one that an older sglmoe wrote."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny_traces import trace_of

from sglmoe.prediction.trace import ARRAYS, Trace, load_trace, save_trace


@pytest.fixture
def trace() -> Trace:
    its = trace_of([[(0, 0, [1, 2, 3])], [(0, 3, [4]), (1, 0, [5, 6])]])
    shape = its.probabilities.shape
    its.probabilities[:] = np.random.default_rng(0).random(shape).astype(np.float16)
    return its


def check_same(read: Trace, written: Trace) -> None:
    assert read.info == written.info
    for name in ARRAYS:
        its, expected = getattr(read, name), getattr(written, name)
        assert (its.dtype, its.shape) == (expected.dtype, expected.shape), name
        assert its.tobytes() == expected.tobytes(), name


def test_every_bit_comes_back(trace: Trace, tmp_path: Path) -> None:
    save_trace(trace, tmp_path / "new.npz")
    check_same(load_trace(tmp_path / "new.npz"), trace)


def test_older_files_have_probabilities_in_one_piece(trace: Trace, tmp_path: Path) -> None:
    arrays = {name: getattr(trace, name) for name in ARRAYS}
    info = np.frombuffer(msgspec.json.encode(trace.info), np.uint8)
    np.savez_compressed(tmp_path / "old.npz", info=info, **arrays)
    check_same(load_trace(tmp_path / "old.npz"), trace)
