"""Prefetched experts join their layer's set in the middle of a step, number 0 where nothing else is said."""

import msgspec
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglmoe.kernels import reference
from sglmoe.kernels.mailbox import Mailbox, commit, post
from sglmoe.kernels.residency import DeviceResidency


def layers(num_experts: int = 4, max_frames: int = 5) -> DeviceResidency:
    """Two layers; the first has frames 10 and 11, and expert 0 in frame 10."""
    state = DeviceResidency.empty(2, num_experts, max_frames, "cpu")
    state.set_frames[0, :2] = torch.tensor([10, 11])
    state.set_owners[0, 0] = 0
    state.set_sizes[0] = 2
    state.frame_table[0, 0] = 10
    state.used_key[0] = 8
    return state


def number(step: int) -> torch.Tensor:
    return torch.tensor([step], dtype=torch.int32)


def test_a_posted_expert_becomes_a_resident_at_its_layers_boundary() -> None:
    state, mailbox = layers(), Mailbox.empty(2, room=2, device="cpu")
    post(mailbox, layer=0, expert=3, frame=15, step=0)
    commit(mailbox, 1, state, step=number(0))
    assert state.frame_table[0].tolist() == [10, -1, -1, -1]  # another layer's boundary
    commit(mailbox, 0, state, step=number(0))
    assert state.frame_table[0].tolist() == [10, -1, -1, 15]
    assert state.set_frames[0, :3].tolist() == [10, 11, 15]
    assert state.set_owners[0].tolist() == [0, -1, 3, -1, -1]
    assert state.set_keys[0, 2] == 7  # not used, and yet the last to go
    commit(mailbox, 0, state, step=number(0))  # a letter is read once
    assert state.set_sizes.tolist() == [3, 0]


def test_the_frame_of_an_expert_that_a_miss_brought_in_first_is_empty() -> None:
    state, mailbox = layers(), Mailbox.empty(2, room=2, device="cpu")
    post(mailbox, layer=0, expert=0, frame=15, step=0)
    commit(mailbox, 0, state, step=number(0))
    assert state.frame_table[0, 0] == 10
    assert state.set_frames[0, :3].tolist() == [10, 11, 15]
    assert state.set_owners[0, :3].tolist() == [0, -1, -1]


def test_letters_go_round_in_their_room() -> None:
    state, mailbox = layers(), Mailbox.empty(2, room=2, device="cpu")
    for expert, frame in ((1, 20), (2, 21), (3, 22)):
        post(mailbox, layer=0, expert=expert, frame=frame, step=0)
        commit(mailbox, 0, state, step=number(0))
    assert state.frame_table[0].tolist() == [10, 20, 21, 22]
    assert (mailbox.posted.tolist(), mailbox.committed.tolist()) == ([3, 0], [3, 0])


def test_a_letter_for_another_step_is_passed_over() -> None:
    """So are those that nobody could read before their place was needed: room is for two."""
    state, mailbox = layers(), Mailbox.empty(2, room=2, device="cpu")
    for expert, step in ((1, 5), (1, 6), (2, 6), (3, 7)):
        post(mailbox, layer=0, expert=expert, frame=20 + expert, step=step)
    commit(mailbox, 0, state, step=number(7))
    assert state.frame_table[0].tolist() == [10, -1, -1, 23]
    assert state.set_frames[0, :3].tolist() == [10, 11, 23]
    assert (state.set_sizes.tolist(), mailbox.committed.tolist()) == ([3, 0], [4, 0])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_letters_are_committed_as_the_reference_does(data: st.DataObject) -> None:
    room = data.draw(st.integers(1, 3))
    state, expected = layers(max_frames=40), layers(max_frames=40)
    mailbox, expected_mailbox = (Mailbox.empty(2, room=room, device="cpu") for _ in range(2))
    frame = 100
    for _ in range(data.draw(st.integers(1, 8))):
        layer = data.draw(st.integers(0, 1))
        step = number(data.draw(st.integers(0, 1)))
        for expert in data.draw(st.lists(st.integers(0, 3), max_size=room + 1)):
            letter = {"expert": expert, "frame": frame, "step": data.draw(st.integers(0, 1))}
            post(mailbox, layer=layer, **letter)
            reference.post(expected_mailbox, layer=layer, **letter)
            frame += 1
        commit(mailbox, layer, state, step=step)
        reference.commit(expected_mailbox, layer, expected, step=step)
        pairs = ((state, expected), (mailbox, expected_mailbox))
        for got, wanted in pairs:
            for name, its in msgspec.structs.asdict(got).items():
                assert torch.equal(its, getattr(wanted, name)), name
