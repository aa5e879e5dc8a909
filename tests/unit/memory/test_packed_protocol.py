"""No race on a device that holds experts packed in the arena: `test_device_protocol.py` with a made-up code.

A tensor of 4 bytes is packed in 3, which are alike; an expert takes 9, so the second cell lies in two frames of 16, and a
tensor of it too. Between steps frames and experts are packed at random. What decodes is queued like the kernel, and says
what it reads and writes.
"""

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import bytes_of
from test_device_protocol import (
    EXPERTS,
    GEOMETRY,
    PAGE_TOKENS,
    PARTS,
    ComputeForgets,
    DemandForgets,
    Disk,
    Server,
    run,
    stand_ins,
)

from sglmoe.memory.decode_ratio import DecodeRatio
from sglmoe.memory.device_decode import DecodedFrames
from sglmoe.memory.load_timer import LoadTimer
from sglmoe.memory.packed_order import Packing
from sglmoe.memory.store import StoredPart

PACKED_BYTES, TENSOR_BYTES = 3, 4


class PackedDisk(Disk):
    """Each expert as it is stored is 9 bytes, full of its number."""

    def __init__(self, fails: Callable[[], bool]):
        super().__init__(fails)
        for (layer, expert, part), array in self._parts.items():
            assert isinstance(array, np.ndarray)
            self._parts[layer, expert, part] = array[:PACKED_BYTES]

    @property
    def is_packed(self) -> bool:
        return True

    def stored_parts(self, layer: int, expert: int) -> list[StoredPart]:
        return [
            StoredPart(index * TENSOR_BYTES, TENSOR_BYTES, index * PACKED_BYTES, PACKED_BYTES, True)
            for index in range(len(PARTS))
        ]

    def read_stored(self, *arguments: Any, **more: Any) -> int:
        self.fail_or_not()
        return super().read_stored(*arguments, **more)


class Decoder:
    """As `decode_tensors`, on the current stream; the code is that of `PackedDisk`."""

    def __init__(self, server: "PackedServer"):
        self._server = server

    def __call__(
        self,
        packed: torch.Tensor,
        sources: torch.Tensor,
        target: torch.Tensor,
        targets: torch.Tensor,
        *,
        num_values: int,
    ) -> None:
        memory, frames = packed.as_subclass(torch.Tensor), target.as_subclass(torch.Tensor)
        frames = frames.view(torch.uint8)
        is_cell = memory.data_ptr() == self._server.raw.data_ptr()
        self._server.seen["cells decoded" if is_cell else "staged decoded"] += 1
        for source, place in zip(sources.tolist(), targets.tolist(), strict=True):
            its = memory[source : source + PACKED_BYTES]
            values = frames[2 * place : 2 * (place + num_values)]
            self._server.device.current_stream().queue(
                "decode of a cell" if is_cell else "decode",
                lambda its=its, values=values: self._decode(its, values),
                reads=[bytes_of(its)],
                writes=[bytes_of(values)],
            )

    def _decode(self, packed: torch.Tensor, values: torch.Tensor) -> None:
        if len(set(packed.tolist())) != 1:
            self._server.wrong.append(f"decoded {packed.tolist()}")
        values.fill_(packed[0])


class PackedServer(Server):
    """Some of its frames hold packed experts."""

    def __init__(self, *arguments: Any, **faults: Any):
        super().__init__(*arguments, **faults)
        self.disk = PackedDisk(lambda: self.random.random() < 0.1)
        self.wanted = [*EXPERTS]
        self.ratio = DecodeRatio()
        self.packing = Packing(PACKED_BYTES * len(PARTS), lambda: 0.1)

    def demand_frames(self, arena: torch.Tensor) -> dict[str, Any]:
        frames = self.decoded(arena, num_staged=2)
        return {"into": frames, "timer": LoadTimer(self.ratio, self.device.Event)}

    def prefetch_frames(self, arena: torch.Tensor) -> dict[str, Any]:
        return {"new_into": lambda: self.decoded(arena, num_staged=1)}

    def decoded(self, arena: torch.Tensor, num_staged: int) -> DecodedFrames:
        frames = arena.view(-1, GEOMETRY.frame_bytes)
        return DecodedFrames(frames, self.disk, num_staged=num_staged, decode=Decoder(self))

    def between_steps(self) -> None:
        self.random.shuffle(self.wanted)
        if self.random.random() < 0.5:
            self.memory.pack(self.random.randint(0, 5), self.wanted)

    def serve(self, num_steps: int) -> None:
        super().serve(2 * num_steps)  # to be packed an expert has to come, and to come again
        snapshot = self.memory.snapshot(0)
        self.seen["kept"] += snapshot.packed_kept
        self.seen["found packed"] += snapshot.packed_hits


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_order_of_threads_and_streams_is_a_race(seed: int) -> None:
    server = run(seed, PackedServer)
    assert server.device.races == []
    assert server.wrong == []


def test_the_runs_meet_all_there_is_to_meet() -> None:
    seen: Counter[str] = Counter()
    for seed in range(40):
        server = run(seed, PackedServer)
        assert server.device.races == server.wrong == []
        seen += server.seen
    met = {"cells decoded", "staged decoded", "kept", "found packed", "failed", "used", "late"}
    assert met | {"wasted", "promoted", "host hits", "disk reads"} <= set(seen)


# ----------------------------------------------------------------- what would go wrong without each


class TwoCells(PackedServer):
    """Two experts are packed in frames that a request had, decoded from there, and a request has these frames again."""

    def run(self) -> set[str]:
        with stand_ins(self):
            self.disk._fails = lambda: False
            self.build()
            self.use_kv("a")
            self.memory.pack(2, [(0, 0), (0, 1)])
            for layer, experts in ((0, [0, 1]), (1, [0, 1, 2, 3]), (0, [0, 1])):
                for wave in self.memory.waves(layer, experts):
                    for expert in wave.tolist():
                        self.launch_expert(
                            layer, expert, int(self.memory.frame_table[layer, expert])
                        )
            assert self.memory.snapshot(0).packed_hits > 0
            self.memory.pack(0, [])
            self.use_kv("b")
            self.background.close()
            self.promoter.close()
            self.device.finish()
        return {*self.device.races, *self.wrong}

    def use_kv(self, rid: str) -> None:
        """As many pages as a request may have."""
        self.memory.admit(rid, bytes(4), rid)
        assert self.memory.extend(rid, PAGE_TOKENS * 10)
        for page in self.memory.pages(rid):
            cells = self.raw.view(-1, GEOMETRY.page_bytes)[page]
            self.device.default.queue(f"KV of {rid}", lambda: None, writes=[bytes_of(cells)])
        self.memory.release(rid, b"", 0)


@pytest.mark.parametrize(
    ("fault", "races"),
    [
        ({}, []),
        ({"make_stream": ComputeForgets}, [("KV of b", "decode of a cell")]),
        ({"make_stream": DemandForgets}, [("copy on the device", "KV of a")]),
    ],
    ids=["as it is", "compute does not wait", "demand does not wait"],
)
def test_cells_and_other_tenants_of_their_frames_wait_for_each_other(
    fault: dict[str, type], races: list[tuple[str, str]]
) -> None:
    found = TwoCells(Random(0), **fault).run()
    assert bool(found) == bool(races)
    for what, other in races:
        assert any(what in race and f"with {other}" in race for race in found)


class OnAnotherStream(PackedServer):
    """What decodes runs beside the stream that fills cells and staging."""

    def decoded(self, arena: torch.Tensor, num_staged: int) -> DecodedFrames:
        frames = super().decoded(arena, num_staged)
        stream, decode = self.device.Stream("decoder"), frames._decode

        def decode_there(*arguments: Any, **more: Any) -> None:
            with self.device.on_stream(stream):
                decode(*arguments, **more)

        frames._decode = decode_there
        return frames


def test_what_decodes_is_on_the_stream_that_fills_cells_and_puts_their_pieces_together() -> None:
    found = {race for seed in range(40) for race in run(seed, OnAnotherStream).device.races}
    for what in ("decode of a cell on decoder", "decode on decoder"):
        assert any(what in race and "copy on the device on demand" in race for race in found)


# ------------------------------------------------------------------------------- times on a device


def test_times_are_read_when_the_device_has_got_there() -> None:
    """One expert in a millisecond, then four decoded in another."""
    server = PackedServer(Random(0))
    timer = LoadTimer(server.ratio, server.device.Event)
    with timer.span(1, is_decoded=False):
        pass
    with timer.span(0, is_decoded=True):
        pass
    with timer.span(4, is_decoded=True):
        pass
    assert server.ratio() == 1.0
    server.device.finish()
    timer.collect()
    assert server.ratio() == pytest.approx(0.25)


def test_times_are_in_seconds() -> None:
    server = PackedServer(Random(0))
    server.ratio.note(0.004, is_decoded=False)  # by a clock of the host's
    timer = LoadTimer(server.ratio, server.device.Event)
    with timer.span(1, is_decoded=True):
        pass
    server.device.finish()
    timer.collect()
    assert server.ratio() == pytest.approx(0.25)


def test_what_failed_is_not_timed() -> None:
    server = PackedServer(Random(0))
    timer = LoadTimer(server.ratio, server.device.Event)
    with timer.span(4, is_decoded=True):
        pass
    with pytest.raises(OSError), timer.span(1, is_decoded=False):  # noqa: PT011 - any
        raise OSError
    server.device.finish()
    timer.collect()
    assert server.ratio() == 1.0, "nothing is known of loads"
