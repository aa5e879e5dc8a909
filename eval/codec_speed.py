"""How small experts get when packed, and how fast they are packed, read and decoded on a CPU.

    python -m eval.codec_speed --directory DISK [--rounds 7] [--output FILE.json]

Ratios: the demo model's experts by kind, and Gaussian weights (standard deviation 0.02) of real experts' shapes. Speeds are in
bytes of bf16 a second, medians of `--rounds` in turn, of one thread but where it says otherwise, on tensors of Qwen3-30B-A3B's
shape: decoding in memory beside copying; reading from the page cache and from DISK, as they are and packed (then they are
checked and decoded).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file
from tqdm import tqdm

from eval.servers import describe_run
from sglmoe.demo_model import DEMO_MODEL
from sglmoe.kernels.exponent_codec.decode_cpu import decode
from sglmoe.kernels.exponent_codec.encode import encode
from sglmoe.kernels.exponent_codec.layout import Bytes
from sglmoe.memory.mapped_files import Extent
from sglmoe.memory.packed_extent import PackedExtent
from sglmoe.memory.transfer import READ_AHEAD

STANDARD_DEVIATION = 0.02
SHAPES = {
    "Qwen3-30B-A3B up_proj": (768, 2048),
    "Qwen3-30B-A3B down_proj": (2048, 768),
    "DeepSeek-V3 up_proj": (2048, 7168),
    "Mixtral-8x7B w1": (14336, 4096),
}
NUM_TENSORS = 96  # of 3 MiB: far more than caches hold

E = TypeVar("E", Extent, PackedExtent)


def gaussian(shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * STANDARD_DEVIATION).to(torch.bfloat16)


def ratio(tensors: Sequence[torch.Tensor]) -> float:
    packed_bytes = sum(encode(tensor).numel() for tensor in tensors)
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    return float(round(packed_bytes / num_bytes, 4))


def measure_ratios() -> dict[str, float]:
    demo = load_file(DEMO_MODEL / "model.safetensors")
    ratios = {}
    for kind in ("gate_proj", "up_proj", "down_proj"):
        its = [tensor for name, tensor in demo.items() if f".{kind}." in name]
        ratios[f"demo model {kind}"] = ratio(its)
    for name, shape in tqdm(SHAPES.items(), unit="shape"):
        ratios[f"Gaussian, {name}"] = ratio([gaussian(shape, 0)])
    return ratios


class Bench:
    """The same tensors in memory and in two files, as they are and packed."""

    def __init__(self, directory: Path):
        shape = SHAPES["Qwen3-30B-A3B up_proj"]
        self.tensors = [gaussian(shape, seed) for seed in tqdm(range(NUM_TENSORS), unit="tensor")]
        self.plain = [tensor.view(torch.uint8).numpy().reshape(-1) for tensor in self.tensors]
        self.packed = [encode(tensor).numpy() for tensor in self.tensors]
        self.num_bytes = sum(its.nbytes for its in self.plain)
        self.target = np.ones(self.plain[0].nbytes, np.uint8)
        self.plain_extents = write(directory / "plain", self.plain)
        self.packed_extents = [
            PackedExtent(extent, xxhash.xxh3_64_intdigest(packed), original)
            for extent, packed, original in zip(
                write(directory / "packed", self.packed),
                self.packed,
                self.plain_extents,
                strict=True,
            )
        ]

    def remember(self) -> None:
        """Have both files in the page cache."""
        for extents in (self.plain_extents, [its.packed for its in self.packed_extents]):
            for extent in extents:
                extent.read_into(memoryview(self.target.data)[: extent.nbytes])

    def forget(self) -> None:
        """Have neither there."""
        for extents in (self.plain_extents, [its.packed for its in self.packed_extents]):
            os.posix_fadvise(extents[0].descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def copy(self) -> None:
        for plain in self.plain:
            self.target[:] = plain

    def decode(self) -> None:
        for packed in self.packed:
            decode(packed, self.target)

    def check(self) -> None:
        for packed in self.packed:
            xxhash.xxh3_64_intdigest(packed)

    def read_plain(self) -> None:
        for extent in asked_ahead(self.plain_extents):
            extent.read_into(memoryview(self.target.data))

    def read_packed(self) -> None:
        for extent in asked_ahead(self.packed_extents):
            extent.read_into(self.target, lambda num_bytes: None)

    def read_packed_twice_at_once(self) -> None:
        """With two threads."""
        targets = [np.ones_like(self.target) for _ in range(2)]

        def read(number: int) -> None:
            for extent in self.packed_extents[number::2]:
                extent.read_into(targets[number], lambda num_bytes: None)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(read, range(2)))

    def encode(self) -> None:
        for tensor in self.tensors[: NUM_TENSORS // 8]:
            encode(tensor)


def asked_ahead(extents: Sequence[E]) -> Iterator[E]:
    """Each, once the disk has been asked for those that follow, as `HostCopier` does."""
    for extent in extents[:READ_AHEAD]:
        extent.will_read()
    for index, extent in enumerate(extents):
        for ahead in extents[index + READ_AHEAD : index + READ_AHEAD + 1]:
            ahead.will_read()
        yield extent


def write(path: Path, arrays: Sequence[Bytes]) -> list[Extent]:
    """One behind the other into a file."""
    extents, offset = [], 0
    with path.open("wb") as file:
        descriptor = os.open(path, os.O_RDONLY)
        for array in arrays:
            file.write(array.data)
            extents.append(Extent(descriptor, offset, array.nbytes, str(path)))
            offset += array.nbytes
        file.flush()
        os.fsync(file.fileno())
    return extents


def measure_speeds(bench: Bench, num_rounds: int) -> dict[str, float]:
    """GB/s of bf16."""
    ways: dict[str, tuple[Callable[[], None], bool]] = {
        "copy in memory": (bench.copy, False),
        "decode in memory": (bench.decode, False),
        "check": (bench.check, False),
        "read as they are, page cache": (bench.read_plain, False),
        "read packed, page cache": (bench.read_packed, False),
        "read packed, page cache, two threads": (bench.read_packed_twice_at_once, False),
        "read as they are, disk": (bench.read_plain, True),
        "read packed, disk": (bench.read_packed, True),
        "encode": (bench.encode, False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in tqdm(range(num_rounds + 1), unit="round"):
        for name, (way, is_cold) in ways.items():
            (bench.forget if is_cold else bench.remember)()
            started = time.perf_counter()
            way()
            if round_number:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    num_bytes = dict.fromkeys(ways, bench.num_bytes) | {"encode": bench.num_bytes // 8}
    return {
        name: round(num_bytes[name] / statistics.median(its) / 1e9, 2)
        for name, its in seconds.items()
    }


def break_even(speeds: dict[str, float], packed_ratio: float) -> float:
    """GB/s of a disk below which packed experts come sooner, with one thread that first reads and then decodes.

    Packed, a byte takes `ratio / disk + work`; as it is, `1 / disk`. `work` is what the page cache shows.
    """
    work = (
        1 / speeds["read packed, page cache"]
        - packed_ratio / speeds["read as they are, page cache"]
    )
    return round((1 - packed_ratio) / work, 2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ratios = measure_ratios()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        speeds = measure_speeds(Bench(Path(directory)), options.rounds)
    report: dict[str, Any] = describe_run() | {
        "ratios": ratios,
        "gigabytes_per_second": speeds,
        "break_even_gigabytes_per_second": break_even(
            speeds, ratios["Gaussian, Qwen3-30B-A3B up_proj"]
        ),
    }
    print(json.dumps(report, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
