"""Free memory of the C heap goes back to the system, now and then."""

import subprocess
import sys

import pytest

from sglmoe.worker.heap import TRIM_SECONDS, Heap


def test_it_is_trimmed_between_steps_when_that_was_long_ago() -> None:
    now, trimmed_at = [0.0], []
    heap = Heap(trim=lambda: trimmed_at.append(now[0]), clock=lambda: now[0])
    for now[0] in (0.0, TRIM_SECONDS - 1, TRIM_SECONDS, TRIM_SECONDS + 1, 3 * TRIM_SECONDS):
        heap.step_done()
    assert trimmed_at == [TRIM_SECONDS, 3 * TRIM_SECONDS]


HOLES = """
import ctypes, sys
from sglmoe.worker.heap import malloc_trim

libc = ctypes.CDLL(None)
if not hasattr(libc, "malloc_trim"):
    sys.exit(77)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def resident_mib():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS")) // 1024

blocks = []
for _ in range(1000):  # 100 MB that are freed, each below 4 KB that are not
    blocks.append(libc.malloc(100_000))
    ctypes.memset(blocks[-1], 1, 100_000)
    libc.malloc(4000)
for block in blocks:
    libc.free(block)
before = resident_mib()
malloc_trim()()
print(before - resident_mib())
"""


def test_holes_between_what_is_in_use_are_given_back() -> None:
    run = subprocess.run(
        [sys.executable, "-c", HOLES], capture_output=True, text=True, timeout=60, check=False
    )
    if run.returncode == 77:
        pytest.skip("another C library than glibc")
    assert int(run.stdout) > 80, run.stderr
