"""A disk of 100 bytes a second."""

import pytest

from sglmoe.memory.read_rate import ReadRate


class Time:
    """Stands still but for what is slept."""

    now = 50.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time() -> Time:
    return Time()


def test_bytes_take_their_time(time: Time) -> None:
    rate = ReadRate(100, clock=lambda: time.now, sleep=time.sleep)
    rate.wait(200)
    assert time.now == pytest.approx(52)
    time.now += 10  # what nobody asked for in between is lost
    rate.wait(50)
    assert time.now == pytest.approx(62.5)


def test_readers_share_it(time: Time) -> None:
    slept: list[float] = []
    rate = ReadRate(100, clock=lambda: time.now, sleep=slept.append)
    rate.wait(100)
    rate.wait(100)  # another thread, at the same moment
    assert slept == [pytest.approx(1), pytest.approx(2)]
