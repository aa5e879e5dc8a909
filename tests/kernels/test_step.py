"""Steps without the host: letters are committed, misses decided and paged in, and whatever a layer reads is there.

Two layers of five experts, nine frames of 16 bytes; an expert is full of its number. Between steps the host moves frames: into
a set, out of it, or out of it to be filled ahead. What is filled ahead comes at any moment, in two halves, and is posted then,
for the step that runs when it has come. Whose letter was not read in that step is a resident when the host has seen it.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglmoe.kernels.dispatch import Dispatched, dispatch
from sglmoe.kernels.mailbox import Mailbox, commit, post
from sglmoe.kernels.page_in import page_in
from sglmoe.kernels.residency import DeviceResidency, PageIns

NUM_LAYERS, NUM_EXPERTS, NUM_FRAMES, ROOM, FRAME_BYTES = 2, 5, 9, 3, 16


class Prefetch:
    """On its way into a frame that is in no set."""

    def __init__(self, layer: int, expert: int, frame: int):
        self.layer = layer
        self.expert = expert
        self.frame = frame
        self.num_halves = 0
        self.step = -1  # that it is posted for


class Machine:
    def __init__(self, data: st.DataObject):
        self.data = data
        self.state = DeviceResidency.empty(NUM_LAYERS, NUM_EXPERTS, NUM_FRAMES + ROOM, "cpu")
        blocks = torch.arange(NUM_LAYERS * NUM_EXPERTS, dtype=torch.int32)
        self.state.block_of[:] = blocks.view(NUM_LAYERS, NUM_EXPERTS)
        self.blocks = blocks.to(torch.uint8).view(-1, 1).repeat(1, FRAME_BYTES)
        self.arena = torch.full((NUM_FRAMES * FRAME_BYTES,), 255, dtype=torch.uint8)
        self.frames = self.arena.view(NUM_FRAMES, FRAME_BYTES)
        self.number = torch.zeros(1, dtype=torch.int32)  # of the step
        self.mailbox = Mailbox.empty(NUM_LAYERS, ROOM, "cpu")
        shapes = (NUM_FRAMES + ROOM, NUM_FRAMES + ROOM, 1)
        self.page_ins = PageIns(*(torch.zeros(n, dtype=torch.int32) for n in shapes))
        self.free = list(range(NUM_FRAMES))
        self.on_their_way: list[Prefetch] = []
        self.posted: list[Prefetch] = []  # and in no set as far as the host knows

    # ----------------------------------------------------------------------- the host, between steps

    def read_back(self) -> None:
        """Whose letter was read is in a set; the others that were posted join one now."""
        for its in self.posted:
            layer, frames = its.layer, self.state.set_frames
            if its.frame in frames[layer, : int(self.state.set_sizes[layer])].tolist():
                continue
            is_absent = int(self.state.frame_table[layer, its.expert]) < 0
            self.lend(layer, its.frame, its.expert if is_absent else -1)
        self.posted.clear()

    def move_frames(self) -> None:
        for _ in range(self.data.draw(st.integers(0, 6), label="moves")):
            layer = self.data.draw(st.integers(0, NUM_LAYERS - 1))
            if self.free and self.data.draw(st.booleans(), label="lend"):
                self.lend(layer, self.free.pop())
            elif int(self.state.set_sizes[layer]):
                frame = self.take(layer)
                if self.num_coming(layer) < ROOM and self.data.draw(st.booleans(), label="ahead"):
                    expert = self.data.draw(st.integers(0, NUM_EXPERTS - 1))
                    self.on_their_way.append(Prefetch(layer, expert, frame))
                else:
                    self.free.append(frame)

    def lend(self, layer: int, frame: int, owner: int = -1) -> None:
        state, place = self.state, int(self.state.set_sizes[layer])
        state.set_frames[layer, place] = frame
        state.set_owners[layer, place] = owner
        if owner >= 0:
            state.frame_table[layer, owner] = frame
        state.set_sizes[layer] += 1

    def take(self, layer: int) -> int:
        """Some frame out of the set; the last one takes its place."""
        state, last = self.state, int(self.state.set_sizes[layer]) - 1
        place = self.data.draw(st.integers(0, last))
        owner, frame = int(state.set_owners[layer, place]), int(state.set_frames[layer, place])
        if owner >= 0:
            state.frame_table[layer, owner] = -1
        for its in (state.set_frames, state.set_owners, state.set_keys):
            its[layer, place] = its[layer, last]
        state.set_sizes[layer] = last
        return frame

    def num_coming(self, layer: int) -> int:
        return sum(its.layer == layer for its in self.on_their_way)

    # -------------------------------------------------------------------------- the device, in a step

    def arrive(self) -> None:
        """The prefetch stream does some of its work."""
        while self.on_their_way and self.data.draw(st.booleans(), label="arrives"):
            its = self.on_their_way[0]
            if its.num_halves < 2:
                half = slice(8 * its.num_halves, 8 * its.num_halves + 8)
                number = its.layer * NUM_EXPERTS + its.expert
                self.frames[its.frame, half] = self.blocks[number, half]
                its.num_halves += 1
            elif its.step < 0:
                its.step = int(self.number)  # which may be over when it is posted
            else:
                letter = {"layer": its.layer, "expert": its.expert, "frame": its.frame}
                post(self.mailbox, **letter, step=its.step)
                self.posted.append(self.on_their_way.pop(0))

    def compute(self, layer: int) -> None:
        state = self.state
        experts = st.lists(st.integers(-1, NUM_EXPERTS - 1), min_size=1, max_size=4)
        ids = self.data.draw(experts, label="routed")
        commit(self.mailbox, layer, state, step=self.number)
        self.arrive()
        before = int(state.shortfall)
        routed = torch.tensor([ids], dtype=torch.int32)
        dispatched = dispatch(
            routed,
            layer,
            num_rows=torch.ones(1, dtype=torch.int32),
            state=state,
            page_ins=self.page_ins,
            ids=torch.empty_like(routed),
            block_tokens=1,
        )
        self.arrive()
        page_in(
            self.blocks,
            self.arena,
            frame_bytes=FRAME_BYTES,
            sources=self.page_ins.sources,
            frames=self.page_ins.frames,
            count=self.page_ins.count,
            num_programs=1,
        )
        self.arrive()
        self.check_blocks(dispatched, layer, ids)
        needed = {expert for expert in ids if expert >= 0}
        absent = {expert for expert in needed if state.frame_table[layer, expert] < 0}
        assert len(absent) == int(state.shortfall) - before
        assert len(needed) <= int(state.set_sizes[layer]) or absent

    def check_blocks(self, dispatched: Dispatched, layer: int, ids: list[int]) -> None:
        """What the layer reads for each pair, a block each: its expert's bytes, or zeros."""
        pairs = dispatched.pairs[: int(dispatched.num_padded)].tolist()
        assert sorted(pairs) == list(range(len(ids)))
        for pair, frame in zip(pairs, dispatched.frames.tolist(), strict=False):
            if frame >= 0:
                assert self.frames[frame].eq(layer * NUM_EXPERTS + ids[pair]).all()
            else:
                assert ids[pair] < 0 or self.state.frame_table[layer, ids[pair]] < 0

    def check(self) -> None:
        """Residents' bytes are in their frames, and each frame is in one place."""
        in_sets = []
        for layer in range(NUM_LAYERS):
            size = int(self.state.set_sizes[layer])
            in_sets += self.state.set_frames[layer, :size].tolist()
            for expert, frame in enumerate(self.state.frame_table[layer].tolist()):
                if frame >= 0:
                    assert self.frames[frame].eq(layer * NUM_EXPERTS + expert).all()
        waiting = [*self.on_their_way, *self.posted]
        elsewhere = [its.frame for its in waiting if its.frame not in in_sets]
        assert sorted(in_sets + self.free + elsewhere) == list(range(NUM_FRAMES))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_a_layer_reads_is_there(data: st.DataObject) -> None:
    machine = Machine(data)
    for _ in range(3):
        machine.read_back()
        machine.move_frames()
        machine.number.add_(1)
        machine.state.used_key.add_(1)
        machine.state.shortfall.zero_()
        for layer in range(NUM_LAYERS):
            machine.arrive()
            machine.compute(layer)
            machine.check()
