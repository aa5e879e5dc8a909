"""Shares of decode steps that used an expert. 2 layers of 4 experts."""

import numpy as np
import pytest

from sglmoe.memory.use_counter import UseCounter


class Steps:
    """A counter, told layer by layer or, as of steps without the host, of all at once."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.counter = UseCounter(2, 4)
        self._at_once = at_once

    def run(self, first: list[int], second: list[int], *, num_decoding: int = 1) -> None:
        is_used = np.zeros((2, 4), bool)
        for layer, experts in enumerate((first, second)):
            is_used[layer, experts] = True
            if not self._at_once:
                self.counter.note(layer, np.array(experts, np.intp))
        if self._at_once:
            self.counter.note_all(is_used)
        self.counter.end_step(num_decoding)

    def probability(self) -> list[list[float]]:
        return self.counter.uses().probability.tolist()


@pytest.mark.parametrize("at_once", [False, True])
def test_used_always_is_one_and_never_is_zero(at_once: bool) -> None:
    steps = Steps(at_once=at_once)
    for _ in range(5):
        steps.run([0, 2], [3])
    assert np.array(steps.probability()) == pytest.approx(np.array([[1, 0, 1, 0], [0, 0, 0, 1]]))


def test_recent_steps_weigh_more() -> None:
    steps = Steps()
    for _ in range(32):
        steps.run([0], [0])
    for _ in range(32):
        steps.run([1], [0])
    # 32 steps ago everything counted half.
    assert steps.probability()[0] == pytest.approx([1 / 3, 2 / 3, 0, 0])


def test_what_is_noted_counts_as_what_waves_are_asked_for() -> None:
    steps = Steps()
    steps.run([0, 2], [3])
    for layer, experts in enumerate(([0, 2], [3])):
        steps.counter.note(layer, np.array(experts))
    steps.counter.end_step(1)
    assert np.array(steps.probability()) == pytest.approx(np.array([[1, 0, 1, 0], [0, 0, 0, 1]]))


def test_prefills_do_not_count() -> None:
    steps = Steps()
    steps.run([0, 1, 2, 3], [0, 1, 2, 3], num_decoding=0)
    steps.run([1], [2])
    assert np.array(steps.probability()) == pytest.approx(np.array([[0, 1, 0, 0], [0, 0, 1, 0]]))


def test_it_knows_how_many_requests_it_was_measured_with() -> None:
    steps = Steps()
    steps.run([0], [0], num_decoding=2)
    steps.run([0], [0], num_decoding=2)
    assert steps.counter.uses().num_running == pytest.approx(2)
    steps.run([0], [0], num_decoding=8)
    assert 4 < steps.counter.uses().num_running < 4.1


def test_weights_do_not_run_out() -> None:
    """They double every 32 steps: after 33,000 they would be infinite."""
    steps = Steps()
    for number in range(40_000):
        steps.counter.note(0, np.array([number % 2]))
        steps.counter.end_step(3)
    assert steps.probability()[0] == pytest.approx([0.5, 0.5, 0, 0], abs=0.01)
    assert steps.counter.uses().num_running == pytest.approx(3)
