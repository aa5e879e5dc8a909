"""Who waits for whom on the link: demand, then prefetch, then what fills host memory."""

import pytest

from sglmoe.memory.experts import Load
from sglmoe.memory.link_gate import LinkGate

LOADS = [Load(0, 0, 0)]


@pytest.fixture
def demand() -> LinkGate:
    return LinkGate()


@pytest.fixture
def prefetch(demand: LinkGate) -> LinkGate:
    return LinkGate(above=demand)


def is_open(gate: LinkGate) -> bool:
    return gate.wait(0)


def test_a_gate_is_closed_with_the_one_above_it(demand: LinkGate, prefetch: LinkGate) -> None:
    assert is_open(demand)
    assert is_open(prefetch)
    with demand.closed():
        assert not is_open(demand)
        assert not is_open(prefetch)
    with prefetch.closed():
        assert is_open(demand)
        assert not is_open(prefetch)
    assert is_open(prefetch)


def test_a_guarded_load_holds_it_until_it_has_finished(demand: LinkGate) -> None:
    demand.guard(lambda loads: None)(LOADS)
    assert is_open(demand), "they are there already"
    finish = demand.guard(lambda loads: lambda: None)(LOADS)
    assert finish is not None
    assert not is_open(demand)
    finish()
    assert is_open(demand)


def test_a_load_that_fails_opens_it_again(demand: LinkGate) -> None:
    def fail(loads: object = None) -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        demand.guard(fail)(LOADS)
    assert is_open(demand)
    finish = demand.guard(lambda loads: fail)(LOADS)
    assert finish is not None
    with pytest.raises(OSError, match="the disk is gone"):
        finish()
    assert is_open(demand)
