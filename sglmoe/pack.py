"""Write the experts of a checkpoint in a smaller form, without loss, beside it.

    python -m sglmoe.pack --model-path MODEL [--output FOLDER] [--threads N]

The server then reads fewer bytes for the same bits, and keeps more experts in --host-memory. MODEL is a folder with bf16
safetensors; by default the files go to MODEL/packed-experts. One file a layer; whatever ends this in between, whole layers
stay and are served, and the next run goes on from there.
"""

import argparse
import errno
import fcntl
import os
import re
import shutil
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
import xxhash
from tqdm import tqdm

from sglmoe.checkpoint import find_shards, read_header
from sglmoe.errors import checkpoints
from sglmoe.kernels.exponent_codec.decode_cpu import decode
from sglmoe.kernels.exponent_codec.encode import encode
from sglmoe.kernels.exponent_codec.layout import Bytes, max_packed_bytes
from sglmoe.packed_checkpoint import (
    ALIGN_BYTES,
    FOLDER,
    UNFINISHED,
    LayerIndex,
    PackedTensor,
    ShardStamp,
    layer_path,
    read_layer,
    stamp,
    write_index,
)
from sglmoe.units import ceil_div, show_bytes

# A routed expert's matrix: its layer, its expert and what the family calls it.
EXPERT_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\..*\bexperts\.(\d+)\.(\w+)\.q?weight$")
# In the order in which they lie in a frame; names of other families come last.
KIND_ORDER = ("gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")
PACKED_DTYPE = "BF16"
# Of bf16 weights, generously: how much room there has to be before anything is written.
EXPECTED_RATIO = 0.72
INTERRUPTED = 130  # as of a process that SIGINT ended


class ExpertTensor(msgspec.Struct, frozen=True):
    """One matrix of one expert, in the checkpoint."""

    name: str
    kind: str
    layer: int
    expert: int
    shard: Path
    offset: int
    num_bytes: int

    @property
    def order(self) -> tuple[int, int, str]:
        known = KIND_ORDER.index(self.kind) if self.kind in KIND_ORDER else len(KIND_ORDER)
        return self.expert, known, self.kind


class PackedBytes(NamedTuple):
    packed: Bytes
    checksum: int


def run(options: argparse.Namespace) -> None:
    """Raises ValueError, saying what to do, for a checkpoint that can't be packed or a disk that is full."""
    folder = options.output or options.model_path / FOLDER
    layers = find_experts(options.model_path)
    shards = {tensor.shard for tensors in layers.values() for tensor in tensors}
    stamps = {shard: stamp(shard) for shard in shards}
    with only_one(folder):
        missing = {
            layer: tensors
            for layer, tensors in layers.items()
            if not is_packed(layer_path(folder, layer), tensors, stamps)
        }
        if done := len(layers) - len(missing):
            print(f"{done} of {len(layers)} layers are packed already")
        check_room(folder, missing)
        pack_layers(folder, missing, stamps, num_threads=options.threads)
        indexes = [
            read_layer(layer_path(folder, its), list(stamps.values())).index for its in layers
        ]
    print_report(indexes)
    flag = f" --packed-experts {options.output.resolve()}" if options.output else ""
    print(f"serve with: python -m sglmoe.launch_server --model-path {options.model_path}{flag}")


def find_experts(folder: Path) -> dict[int, list[ExpertTensor]]:
    """The experts' tensors by layer, as they are to be written. Raises ValueError where there are none in bf16."""
    layers: dict[int, list[ExpertTensor]] = defaultdict(list)
    others: set[str] = set()
    for shard in find_shards(folder):
        header, start = read_header(shard)
        for name, its in header.items():
            match = EXPERT_NAME.search(name)
            if match is None:
                continue
            if its["dtype"] != PACKED_DTYPE:
                others.add(its["dtype"])
                continue
            begin, end = its["data_offsets"]
            layer, expert, kind = int(match[1]), int(match[2]), match[3]
            layers[layer].append(
                ExpertTensor(name, kind, layer, expert, shard.resolve(), start + begin, end - begin)
            )
    if others:
        raise checkpoints.only_bf16_is_packed(folder=folder, dtypes=sorted(others))
    if not layers:
        raise checkpoints.no_experts_to_pack(folder=folder)
    return {
        layer: sorted(its, key=lambda tensor: tensor.order) for layer, its in sorted(layers.items())
    }


def is_packed(path: Path, tensors: Sequence[ExpertTensor], stamps: dict[Path, ShardStamp]) -> bool:
    """Whether a run before this one has written the layer, from this checkpoint."""
    try:
        index = read_layer(path, list(stamps.values())).index
    except ValueError:
        return False
    return [its.name for its in index.tensors] == [its.name for its in tensors]


def check_room(folder: Path, layers: dict[int, list[ExpertTensor]]) -> None:
    all_bytes = sum(its.num_bytes for tensors in layers.values() for its in tensors)
    needed_bytes = int(EXPECTED_RATIO * all_bytes)
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise checkpoints.no_room_to_pack(
            folder=folder, needed_bytes=needed_bytes, free_bytes=free_bytes
        )


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """While nobody else packs into the folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise checkpoints.cannot_write(folder=folder, why=str(error.strerror)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise checkpoints.packed_by_another(folder=folder) from error
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ packing


def pack_layers(
    folder: Path,
    layers: dict[int, list[ExpertTensor]],
    stamps: dict[Path, ShardStamp],
    *,
    num_threads: int,
) -> None:
    """Write a file for each layer. Raises ValueError where the disk does not take it."""
    all_bytes = sum(its.num_bytes for tensors in layers.values() for its in tensors)
    with (
        ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        tqdm(total=all_bytes, unit="B", unit_scale=True, desc="packing") as progress,
    ):
        for number, (layer, tensors) in enumerate(layers.items()):
            packed = in_order(pool, pack_tensor, tensors, num_ahead=num_threads + 1)
            try:
                write_layer(layer_path(folder, layer), tensors, packed, stamps, progress.update)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise checkpoints.disk_full(
                    folder=folder,
                    why=str(error.strerror),
                    num_done=number,
                    num_layers=len(layers),
                ) from error


def write_layer(
    path: Path,
    tensors: Sequence[ExpertTensor],
    packed: Iterable[PackedBytes],
    stamps: dict[Path, ShardStamp],
    on_bytes: Callable[[int], object],
) -> None:
    """Write a layer's file, whole or not at all."""
    unfinished = path.with_name(path.name + UNFINISHED)
    written: list[PackedTensor] = []
    try:
        with unfinished.open("wb") as file:
            for tensor, its in zip(tensors, packed, strict=True):
                offset = ceil_div(file.tell(), ALIGN_BYTES) * ALIGN_BYTES
                file.write(bytes(offset - file.tell()))
                file.write(its.packed.data)
                written.append(entry(tensor, offset, its))
                on_bytes(tensor.num_bytes)
            shards = [stamps[shard] for shard in sorted({its.shard for its in tensors})]
            file.write(write_index(LayerIndex(shards, written), file.tell()))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def entry(tensor: ExpertTensor, offset: int, its: PackedBytes) -> PackedTensor:
    return PackedTensor(
        name=tensor.name,
        shard=tensor.shard.name,
        shard_offset=tensor.offset,
        num_bytes=tensor.num_bytes,
        packed_offset=offset,
        packed_bytes=its.packed.nbytes,
        checksum=its.checksum,
    )


def pack_tensor(tensor: ExpertTensor) -> PackedBytes:
    """Read, pack, and see that decoding gives the same bits."""
    values = np.fromfile(tensor.shard, np.uint8, tensor.num_bytes, offset=tensor.offset)
    packed = encode(torch.from_numpy(values).view(torch.int16)).numpy()
    decoded = np.empty_like(values)
    decode(packed, decoded)
    if not np.array_equal(values, decoded):
        raise AssertionError(f"{tensor.name} decodes to something else; please report this")
    return PackedBytes(packed, xxhash.xxh3_64_intdigest(packed))


def in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[ExpertTensor], PackedBytes],
    tensors: Iterable[ExpertTensor],
    *,
    num_ahead: int,
) -> Iterator[PackedBytes]:
    """The function of each, no more than `num_ahead` before they are asked for: results are large."""
    ahead: deque[Future[PackedBytes]] = deque()
    for tensor in tensors:
        ahead.append(pool.submit(function, tensor))
        if len(ahead) > num_ahead:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


# ------------------------------------------------------------------------------------------------ words


def print_report(indexes: Sequence[LayerIndex]) -> None:
    kinds: dict[str, list[PackedTensor]] = defaultdict(list)
    for index in indexes:
        for tensor in index.tensors:
            match = EXPERT_NAME.search(tensor.name)
            kinds[match[3] if match else tensor.name].append(tensor)
    everything = [tensor for tensors in kinds.values() for tensor in tensors]
    for kind, tensors in {**kinds, "all": everything}.items():
        num_bytes, packed_bytes = sum_bytes(tensors)
        num_raw = sum(its.packed_bytes == max_packed_bytes(its.num_bytes // 2) for its in tensors)
        raw = f", {num_raw} of them stored as they are" if num_raw else ""
        print(
            f"{kind}: {len(tensors)} tensors{raw}, {show_bytes(num_bytes)} -> "
            f"{show_bytes(packed_bytes)} ({packed_bytes / num_bytes:.1%})"
        )
    num_bytes, packed_bytes = sum_bytes(everything)
    saved = show_bytes(num_bytes - packed_bytes)
    print(f"{saved} less to read for all experts, and to keep in --host-memory")


def sum_bytes(tensors: Sequence[PackedTensor]) -> tuple[int, int]:
    return sum(its.num_bytes for its in tensors), sum(its.packed_bytes for its in tensors)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglmoe.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", type=Path, required=True, metavar="MODEL")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except ValueError as error:
        print(f"python -m sglmoe.pack: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; whole layers stay, run this again to go on", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
