"""Where the bytes of experts that are not resident come from: views of host memory or of a mapped
checkpoint file, which may have another form than a frame, or the same in packed form in another file.

Knows names and sizes. Keeps no copy: what `put` is given must stay alive and unchanged.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from sglmoe.errors import checkpoints
from sglmoe.memory.checkpoint_form import Converted
from sglmoe.memory.mapped_files import Extent, MappedFiles, UnreadableError
from sglmoe.memory.packed_extent import BeforeBytes, InMemory, PackedExtent, PackedPlace, unpack
from sglmoe.memory.read_rate import ReadRate
from sglmoe.memory.staging import slot_bytes

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
Plain = Bytes | Extent
Part = Plain | Converted | PackedExtent


class StoredPart(NamedTuple):
    """One of an expert's tensors, in a frame and among what `read_stored` gives, in bytes."""

    offset: int  # in the frame
    num_bytes: int
    stored_offset: int
    stored_bytes: int
    is_packed: bool


# Of experts that are weights alone: w13 is the rows of w1 (gate), then those of w3 (up); w2 (down) follows.
PARTS = ("w1", "w3", "w2")
# Arbitrary: 2 to 8 ms of a disk that reads 0.5 to 2 GB/s. Where reads give way to others, they do so in between.
CHUNK_BYTES = 4 * 2**20
# Arbitrary: a thread that reads faster than that reads the page cache, and need not ask ahead.
CACHE_BYTES_PER_SECOND = 10**9


class ExpertReadError(OSError):
    """An expert can't be read. Says which, from which file, why, and what to do."""


class ExpertStore:
    """(layer, expert) -> its tensors, in the order in which they lie in a frame.

    `rate` makes it slower than it is, whether experts are in files or in memory.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.perf_counter, rate: ReadRate | None = None
    ) -> None:
        self._parts: dict[tuple[int, int, str], Part] = {}
        self._offsets: Mapping[str, int] | None = None
        self.total_bytes = 0
        self._clock = clock
        self._rate = rate
        self._damaged: set[str] = set()  # paths of packed files; several threads may add to it
        self._disk_is_asked = True  # by the last read; a guess, so threads need not agree on it

    def lay_out(self, offsets: Mapping[str, int]) -> None:
        """Say which tensors every expert has, and at which byte of a frame each begins, in ascending order.

        Before anything is `put`. Without it these are PARTS, one behind the other.
        """
        assert not self._parts
        self._offsets = offsets

    @property
    def part_names(self) -> tuple[str, ...]:
        """What every expert has, as it lies in a frame."""
        return PARTS if self._offsets is None else tuple(self._offsets)

    def put(self, layer: int, expert: int, part: str, its: Bytes | Converted) -> None:
        """Keep a reference to one tensor's bytes: one-dimensional, contiguous uint8."""
        if part not in self.part_names:
            raise ValueError(f"layer {layer} expert {expert} has no tensor {part!r}")
        if (layer, expert, part) in self._parts:
            raise checkpoints.repeated_tensor(layer=layer, expert=expert, part=part)
        array = source_of(its)
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.uint8
        assert array.ndim == 1
        assert array.flags.c_contiguous
        self._parts[layer, expert, part] = its
        self.total_bytes += its.nbytes

    def parts(self, layer: int, expert: int) -> list[tuple[int, Part]]:
        """The expert's tensors with their offsets, in bytes, within a frame."""
        arrays = [self._parts[layer, expert, name] for name in self.part_names]
        if self._offsets is not None:
            return list(zip(self._offsets.values(), arrays, strict=True))
        ends = accumulate((array.nbytes for array in arrays), initial=0)
        return list(zip(ends, arrays, strict=False))

    def read(
        self,
        layer: int,
        expert: int,
        target: Bytes,
        *,
        before_chunk: Callable[[], None] | None = None,
    ) -> int:
        """Copy the expert to the start of `target`, contiguous and large enough; its bytes.

        `before_chunk` is called before each CHUNK_BYTES or less; what it raises ends the read. Raises
        ExpertReadError, and then `target` has changed in part.
        """
        num_bytes, started = 0, self._clock()
        step = sys.maxsize if before_chunk is None else CHUNK_BYTES
        before_bytes = self._before_bytes(before_chunk)
        for offset, part in self.parts(layer, expert):
            place = target[offset : offset + part.nbytes]
            try:
                self._read_part(part, place, step, before_bytes)
            except UnreadableError as error:
                raise _read_error(layer, expert, part, error) from error
            num_bytes += part.nbytes
        if before_chunk is None:  # else it may have waited
            seconds = self._clock() - started
            self._disk_is_asked = num_bytes < CACHE_BYTES_PER_SECOND * seconds
        return num_bytes

    def stored_parts(self, layer: int, expert: int) -> list[StoredPart]:
        """Where `read_stored` puts the expert's tensors: one behind the other, packed ones at the end of their slots."""
        placed, stop = [], 0
        for offset, part in self.parts(layer, expert):
            is_packed, num_bytes = isinstance(part, PackedExtent), stored_bytes(part)
            stop += slot_bytes(num_bytes) if is_packed else num_bytes
            placed.append(StoredPart(offset, part.nbytes, stop - num_bytes, num_bytes, is_packed))
        return placed

    def read_stored(
        self,
        layer: int,
        expert: int,
        target: Bytes,
        *,
        before_chunk: Callable[[], None] | None = None,
    ) -> int:
        """As `read`, but the bytes as they are stored, packed or not; how many. For `unpack`."""
        before_bytes = self._before_bytes(before_chunk)
        stored = self.stored_parts(layer, expert)
        for its, (_, part) in zip(stored, self.parts(layer, expert), strict=True):
            place = target[its.stored_offset : its.stored_offset + its.stored_bytes]
            try:
                self._read_stored_part(part, place, before_bytes)
            except UnreadableError as error:
                raise _read_error(layer, expert, part, error) from error
        return sum(its.stored_bytes for its in stored)

    def unpack(
        self,
        layer: int,
        expert: int,
        stored: Sequence[Bytes],
        target: Bytes,
        *,
        before_chunk: Callable[[], None] | None = None,
    ) -> int:
        """Copy what `read_stored` gave, in pieces that follow each other, to the start of `target` as `read` would; its
        bytes."""
        step = sys.maxsize if before_chunk is None else CHUNK_BYTES

        def before_bytes(num_bytes: int) -> None:
            if before_chunk is not None:
                before_chunk()

        num_bytes, num_taken, source = 0, 0, InMemory(stored, before_bytes)
        for part in self.stored_parts(layer, expert):
            source.skip(part.stored_offset - num_taken)
            num_taken = part.stored_offset + part.stored_bytes
            place = target[part.offset : part.offset + part.num_bytes]
            if part.is_packed:
                unpack(source, part.stored_bytes, place)
            else:
                for start in range(0, part.num_bytes, step):
                    piece = place[start : start + step]
                    piece[:] = source.take(piece.nbytes)
            num_bytes += part.num_bytes
        return num_bytes

    def read_and_keep(self, layer: int, expert: int, target: Bytes, kept: Sequence[Bytes]) -> int:
        """As `read`, and copy what `read_stored` gives to the beginning of `kept`, pieces that follow each other."""
        last = self.stored_parts(layer, expert)[-1]
        stored = np.empty(last.stored_offset + last.stored_bytes, np.uint8)
        self.read_stored(layer, expert, stored)
        return self.unpack_and_keep(layer, expert, stored, target, kept)

    def unpack_and_keep(
        self, layer: int, expert: int, stored: Bytes, target: Bytes, kept: Sequence[Bytes]
    ) -> int:
        """As `unpack`, and copy `stored` to `kept`, as far as that goes."""
        num_bytes = self.unpack(layer, expert, [stored], target)
        for piece in kept:
            part, stored = stored[: piece.nbytes], stored[piece.nbytes :]
            piece[: part.nbytes] = part
        return num_bytes

    def _before_bytes(self, before_chunk: Callable[[], None] | None) -> BeforeBytes:
        def before_bytes(num_bytes: int) -> None:
            if before_chunk is not None:
                before_chunk()
            if self._rate is not None:
                self._rate.wait(num_bytes)  # no byte comes before

        return before_bytes

    def _read_part(self, part: Part, target: Bytes, step: int, before_bytes: BeforeBytes) -> None:
        if isinstance(part, PackedExtent):
            if self._could_read(part, lambda: part.read_into(target, before_bytes)):
                return
            _read_plain(part.original, target, step, before_bytes)
        else:
            _read_unpacked(part, target, step, before_bytes)

    def _read_stored_part(self, part: Part, target: Bytes, before_bytes: BeforeBytes) -> None:
        if not isinstance(part, PackedExtent):
            _read_unpacked(part, target, CHUNK_BYTES, before_bytes)
        elif not self._could_read(part, lambda: part.read_packed(target, before_bytes)):
            part.pack_again(target, before_bytes)

    def _could_read(self, part: PackedExtent, read: Callable[[], None]) -> bool:
        """Read the part in its packed form, if its file has been sound so far and is."""
        if part.path in self._damaged:
            return False
        try:
            read()
            return True
        except UnreadableError as error:
            self._damaged.add(part.path)
            logger.warning("%s", checkpoints.packed_damaged(path=part.path, why=str(error)))
            return False

    def will_read(self, layer: int, expert: int) -> None:
        """Begin to read the expert, if it is in files; `read` is to follow soon.

        Nothing while the page cache has what is read: asking takes a fifth as long as reading then.
        """
        if not self._disk_is_asked:
            return
        for _, part in self.parts(layer, expert):
            source = source_of(part)
            if isinstance(source, Extent | PackedExtent):
                source.will_read()

    def unmap(self) -> int:
        """From now on, read what is a view of a mapped file from that file; the bytes still in memory.

        Lets go of the views, and with the last of them of the mapping: no absent expert counts as
        this process's memory any more. What is in memory of our own stays there.
        """
        files = MappedFiles()
        held_bytes = 0
        for key, part in self._parts.items():
            source = source_of(part)
            if not isinstance(source, np.ndarray):
                continue
            extent = files.extent(source.ctypes.data, source.nbytes)
            if extent is None:
                held_bytes += source.nbytes
            elif isinstance(part, Converted):
                self._parts[key] = msgspec.structs.replace(part, source=extent)
            else:
                self._parts[key] = extent
        return held_bytes

    def use_packed(self, packed: Mapping[tuple[str, int], PackedPlace]) -> int:
        """From now on, read packed what lies in a file at one of these `(path, offset)`; how many tensors that are."""
        num_tensors = 0
        for key, part in self._parts.items():
            place = packed.get((part.path, part.offset)) if isinstance(part, Extent) else None
            if place is not None and isinstance(part, Extent) and place.num_bytes == part.nbytes:
                self._parts[key] = PackedExtent(place.packed, place.checksum, original=part)
                num_tensors += 1
        return num_tensors

    def paths(self) -> set[str]:
        """The files that experts lie in as they are."""
        return {part.path for part in self._parts.values() if isinstance(part, Extent)}

    def experts(self) -> list[tuple[int, int]]:
        """Every (layer, expert), in order."""
        return sorted({(layer, expert) for layer, expert, _ in self._parts})

    def expert_bytes(self) -> int:
        """How much of a frame the largest expert takes; 0 if there is none."""
        sizes: dict[tuple[int, int], int] = {}
        for (layer, expert, name), part in self._parts.items():
            so_far = sizes.get((layer, expert), 0)
            start = so_far if self._offsets is None else self._offsets[name]
            sizes[layer, expert] = max(so_far, start + part.nbytes)
        return max(sizes.values(), default=0)

    def stored_expert_bytes(self) -> int:
        """Likewise, as experts are stored."""
        last = (self.stored_parts(*expert)[-1] for expert in self.experts())
        return max((part.stored_offset + part.stored_bytes for part in last), default=0)

    @property
    def is_packed(self) -> bool:
        """Whether any tensor is."""
        return any(isinstance(part, PackedExtent) for part in self._parts.values())

    def stored_total_bytes(self) -> int:
        """Of all experts, as they are stored."""
        return sum(map(stored_bytes, self._parts.values()))

    def check_complete(self, num_layers: int, num_experts: int) -> None:
        """Raises ValueError naming the first tensor that was never put."""
        for layer in range(num_layers):
            for expert in range(num_experts):
                for part in self.part_names:
                    if (layer, expert, part) not in self._parts:
                        raise checkpoints.missing_tensor(layer=layer, expert=expert, part=part)


def source_of(part: Part) -> Plain | PackedExtent:
    """What is read for it."""
    return part.source if isinstance(part, Converted) else part


def stored_bytes(part: Part) -> int:
    """What a tensor takes where it is stored."""
    return part.packed.nbytes if isinstance(part, PackedExtent) else part.nbytes


def _read_unpacked(
    part: Plain | Converted, target: Bytes, step: int, before_bytes: BeforeBytes
) -> None:
    if not isinstance(part, Converted):
        _read_plain(part, target, step, before_bytes)
        return
    source = np.empty(part.source.nbytes, np.uint8)
    _read_plain(part.source, source, step, before_bytes)
    target[:] = part.convert(source)


def _read_plain(part: Plain, target: Bytes, step: int, before_bytes: BeforeBytes) -> None:
    """Fill `target` with the part, at most `step` bytes at a time."""
    for start in range(0, part.nbytes, step):
        piece = target[start : start + step]
        before_bytes(piece.nbytes)
        _copy(part, piece, start)


def _copy(part: Plain, target: Bytes, start: int) -> None:
    """Fill `target` from byte `start` of the part on."""
    if isinstance(part, Extent):
        part.read_into(memoryview(target.data), start)
    else:
        target[:] = part[start : start + target.nbytes]


def _read_error(layer: int, expert: int, part: Part, error: UnreadableError) -> ExpertReadError:
    source = source_of(part)
    path = "memory" if isinstance(source, np.ndarray) else source.path
    why = checkpoints.unreadable_expert(layer=layer, expert=expert, source=path, why=str(error))
    return ExpertReadError(str(why))
