"""Does it help to ask the disk for the experts of a wave at once (`HostCopier`, POSIX_FADV_WILLNEED)?

    python -m eval.read_ahead --directory DIRECTORY [--expert-sizes 1MiB,3MiB,9MiB] [--waves 1,8] [--hot]

Writes a file of 1 GiB of noise to that disk, and removes it. Experts that are chosen anew each time
are loaded with and without, in pairs in random order, from a page cache that holds none of the file
(or, with --hot, all of it); printed are the median speeds and the median and quartiles of the ratios.
"""

import argparse
import mmap
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sglmoe.memory.experts import Load
from sglmoe.memory.store import PARTS, ExpertStore
from sglmoe.memory.transfer import HostCopier
from sglmoe.units import parse_bytes, show_bytes

FILE_BYTES = 2**30
RUN_BYTES = 120 * 10**6  # of one measurement, at least a wave


class PlainStore(ExpertStore):
    """Asks for nothing ahead."""

    def will_read(self, layer: int, expert: int) -> None:
        pass


def fill(store: ExpertStore, path: Path, expert_bytes: int) -> None:
    """Cut the file into experts of one layer, of three equal parts each."""
    part_bytes = expert_bytes // len(PARTS)
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    for number in range(FILE_BYTES // part_bytes // len(PARTS) * len(PARTS)):
        expert, part = divmod(number, len(PARTS))
        start = number * part_bytes
        store.put(0, expert, PARTS[part], mapped[start : start + part_bytes])
    store.unmap()


def drop_from_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, FILE_BYTES, os.POSIX_FADV_DONTNEED)


def speed(store: ExpertStore, path: Path, wave: int, *, hot: bool) -> float:
    """Bytes a second of demand loads, `wave` experts at a time."""
    expert_bytes, num_experts = store.expert_bytes(), len(store.experts())
    num_loaded = min(num_experts, max(wave, RUN_BYTES // expert_bytes)) // wave * wave
    experts = random.sample(range(num_experts), num_loaded)
    arena = np.ones(wave * expert_bytes, np.uint8)  # pages that are there already
    copier = HostCopier(
        arena, frame_bytes=expert_bytes, store=store, num_threads=os.cpu_count() or 1
    )
    if not hot:
        drop_from_cache(path)
    started = time.perf_counter()
    for first in range(0, num_loaded, wave):
        its_experts = experts[first : first + wave]
        copier.load([Load(frame, 0, expert) for frame, expert in enumerate(its_experts)])
    seconds = time.perf_counter() - started
    copier.close()
    return num_loaded * expert_bytes / seconds


def compare(path: Path, expert_bytes: int, wave: int, *, hot: bool, num_pairs: int) -> str:
    stores = {"with": ExpertStore(), "without": PlainStore()}
    for store in stores.values():
        fill(store, path, expert_bytes)
    speeds: dict[str, list[float]] = {name: [] for name in stores}
    for _ in range(num_pairs):
        for name in random.sample(list(stores), 2):
            speeds[name].append(speed(stores[name], path, wave, hot=hot))
    ratios = [a / b for a, b in zip(speeds["with"], speeds["without"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    before, after = (statistics.median(speeds[name]) / 1e6 for name in ("without", "with"))
    return (
        f"experts of {show_bytes(expert_bytes)}, {wave} a wave: {before:.0f} -> {after:.0f} MB/s, "
        f"x {middle:.2f} ({low:.2f} to {high:.2f})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--expert-sizes", default="1MiB,3MiB,9MiB")
    parser.add_argument("--waves", default="1,8")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--hot", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.NamedTemporaryFile(dir=options.directory) as file:
        for _ in range(FILE_BYTES >> 24):
            file.write(os.urandom(1 << 24))
        file.flush()
        os.fsync(file.fileno())
        for size in options.expert_sizes.split(","):
            expert_bytes = parse_bytes(size, whole_bytes=0) // 3 * 3
            for wave in options.waves.split(","):
                path = Path(file.name)
                print(
                    compare(
                        path, expert_bytes, int(wave), hot=options.hot, num_pairs=options.pairs
                    ),
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
